"""`SampleFeed`: the samples of each step, prepared by an actor ahead of need. Of pixels the driver has references."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from ray_ministral.data.row_reader import RowPlace
from ray_ministral.driver.evaluation import Get
from ray_ministral.driver.train_job import TrainJob
from ray_ministral.errors import InputError
from ray_ministral.training.samples import PreparedSamples
from ray_ministral.training.targets import TrainSample

STEPS_AHEAD = 2
"""Steps whose samples are prepared before they are needed."""


class SampleFeed:
    """Of a job. `sampler` is the actor; which rows a step has, the order of the job says, however often it is asked."""

    def __init__(self, job: TrainJob, sampler: Any) -> None:
        self._job, self._sampler = job, sampler
        self._ahead: deque[tuple[int, Any, Any]] = deque()
        self._fill(job.first_step)

    def prepare(self, places: Sequence[RowPlace]) -> tuple[Any, Any]:
        """References to the samples of some rows and to their pixels."""
        samples, pixels = self._sampler.prepare.options(num_returns=2).remote(places)
        return samples, pixels

    def samples(self, step: int, get: Get) -> tuple[PreparedSamples, Any]:
        """The samples of a step and the reference to their pixels."""
        self._fill(step)
        _, reference, pixels = self._ahead[0]
        prepared: PreparedSamples = get([reference])[0]
        self._ahead.popleft()
        self._fill(step + 1)
        return prepared, pixels

    def first_samples(self, get: Get) -> list[TrainSample]:
        """Samples of the first step, to see what each layer costs. Raises `InputError` where none can be used."""
        self._fill(self._job.first_step)
        if not self._ahead:
            return []
        prepared: PreparedSamples = get([self._ahead[0][1]])[0]
        samples = [sample for sample in prepared.samples if sample is not None]
        if not samples:
            skipped = prepared.skipped
            raise InputError(f"none of the first {len(skipped)} rows of --train can be used; {skipped[0]}")
        return samples

    def forget(self) -> None:
        """After a loss: what was prepared may be lost with a node, or be of a step that is long done."""
        self._ahead.clear()

    def _fill(self, step: int) -> None:
        """Start preparing `step` and those behind it."""
        job = self._job
        if self._ahead and self._ahead[0][0] != step:
            self._ahead.clear()
        next_step = step + len(self._ahead)
        while len(self._ahead) < STEPS_AHEAD and next_step < job.total_steps:
            numbers = job.order.step_samples(next_step, job.config.global_batch_size)
            self._ahead.append((next_step, *self.prepare([job.rows.place(number) for number in numbers])))
            next_step += 1
