"""The Ray task of a training job that prepares samples, away from the driver. Reserves no CPU, as in `tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import ray

from ray_ministral.data.row_reader import RowPlace
from ray_ministral.data.rows import Pixels
from ray_ministral.training.samples import PreparedSamples, SampleOptions, SamplePreparer


@lru_cache(maxsize=1)
def _preparer(options: SampleOptions) -> SamplePreparer:
    """A worker process prepares many steps of one job: tokenizer and image processor are loaded once."""
    return SamplePreparer(options)


@ray.remote(num_cpus=0, num_returns=2, max_retries=3)
def prepare_samples(options: SampleOptions, places: Sequence[RowPlace]) -> tuple[PreparedSamples, Pixels]:
    """See `SamplePreparer.prepare_step`."""
    return _preparer(options).prepare_step(places)
