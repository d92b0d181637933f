"""The Ray actor of a training job that prepares samples, away from the driver.

One for each job: what it has read of the data is kept, and would be kept several times over by several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from ray_ministral.data.row_reader import RowPlace
from ray_ministral.data.rows import Pixels
from ray_ministral.training.samples import PreparedSamples, SampleOptions, SamplePreparer


class SampleActor:
    """A `SamplePreparer` in a process of its own."""

    def __init__(self, options: SampleOptions) -> None:
        self._options = options
        self._preparer: SamplePreparer | None = None

    def prepare(self, places: Sequence[RowPlace]) -> tuple[PreparedSamples, Pixels]:
        """See `SamplePreparer.prepare_step`."""
        if self._preparer is None:
            # Not in __init__: what it raises is to be the failure of a call, with its cause, and not a dead actor's.
            self._preparer = SamplePreparer(self._options)
        return self._preparer.prepare_step(places)


def start_sample_actor(options: SampleOptions) -> Any:
    """The actor, as a Ray handle; two references come of `prepare.options(num_returns=2).remote(places)`.

    It reserves no CPU (docs/decisions/0005). It has no state but a cache, so Ray may start it anew and repeat a call.
    """
    remote: Any = ray.remote  # its type stubs lack the options of actors
    return remote(num_cpus=0, max_restarts=3, max_task_retries=3)(SampleActor).remote(options)
