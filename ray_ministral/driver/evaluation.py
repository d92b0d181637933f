"""Evaluation while a model trains: the loss on other samples, forward alone, on the stages that train.

Nothing changes by it: a step after an evaluation has the bits that it has without one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from ray_ministral.data.row_reader import RowIndex, RowPlace
from ray_ministral.driver.pipeline import Pipeline
from ray_ministral.driver.train_job import TrainJob
from ray_ministral.errors import InputError
from ray_ministral.pipeline.generators import make_schedule
from ray_ministral.training.packing import build_microbatches, num_microbatches
from ray_ministral.training.plan import TrainMicrobatch, TrainPlan
from ray_ministral.training.samples import PreparedSamples, SkippedRow

BATCHES_AHEAD = 2
"""Batches whose samples are prepared before they are needed."""

Prepare = Callable[[Sequence[RowPlace]], tuple[Any, Any]]
"""Starts preparing rows: references to their samples and to their pixels."""

Get = Callable[[list[Any]], list[Any]]
"""Results of calls to stages, within a deadline; raises what a job ends with."""


@dataclass(frozen=True)
class EvalResult:
    """One line of `eval.jsonl`: after `step` steps the mean `loss` over `tokens` targets of `rows` rows."""

    step: int
    loss: float
    tokens: int
    rows: int
    skipped: int


class Evaluator:
    """The loss on the rows of `--eval`, `global_batch_size` of them at a time, on all replicas."""

    def __init__(self, job: TrainJob, rows: RowIndex, replicas: Sequence[Pipeline], prepare: Prepare, get: Get) -> None:
        self._job, self._rows, self._replicas, self._prepare, self._get = job, rows, replicas, prepare, get
        self._actions = lru_cache(maxsize=8)(self._forward_actions)

    def loss(self, step: int) -> tuple[EvalResult, list[SkippedRow]]:
        """After `step` steps; and the rows that could not be used. Raises `InputError` where none of them can."""
        losses: list[float] = []
        targets = rows = 0
        skipped: list[SkippedRow] = []
        batches = self._batches()
        while together := list(islice(batches, len(self._replicas))):
            microbatches = [self._pack(prepared) for prepared, _ in together]
            for own in self._forward(step, microbatches, [pixels for _, pixels in together]):
                losses += own
            targets += sum(microbatch.num_targets for own in microbatches for microbatch in own)
            for prepared, _ in together:
                skipped += prepared.skipped
                rows += len(prepared.samples) - len(prepared.skipped)
        if not rows:
            raise InputError(
                f"--eval {self._job.config.eval.path} has no row that can be used; the first, {skipped[0]}"
            )
        return EvalResult(step, sum(losses) / targets, targets, rows, len(skipped)), skipped

    def _batches(self) -> Iterator[tuple[PreparedSamples, Any]]:
        """The samples of each batch and the reference to their pixels."""
        config = self._job.config
        size = config.global_batch_size
        count = len(self._rows) if config.eval.limit is None else min(config.eval.limit, len(self._rows))
        ahead: deque[tuple[Any, Any]] = deque()
        for start in range(0, count, size):
            places = [self._rows.place(number) for number in range(start, min(start + size, count))]
            ahead.append(self._prepare(places))
            if len(ahead) > BATCHES_AHEAD * len(self._replicas):
                yield self._prepared(*ahead.popleft())
        while ahead:
            yield self._prepared(*ahead.popleft())

    def _prepared(self, reference: Any, pixels: Any) -> tuple[PreparedSamples, Any]:
        return self._get([reference])[0], pixels

    def _pack(self, prepared: PreparedSamples) -> tuple[TrainMicrobatch, ...]:
        """As a step's samples are packed."""
        config = self._job.config
        return build_microbatches(
            [prepared.samples], num_microbatches(config.global_batch_size, config.microbatch_size)
        )

    def _forward(
        self, step: int, batches: Sequence[tuple[TrainMicrobatch, ...]], pixels: Sequence[Any]
    ) -> list[list[float]]:
        """A batch on each replica; the sums of token losses of its microbatches."""
        calls = []
        for pipeline, own, reference in zip(self._replicas, batches, pixels, strict=False):
            total = max(1, sum(microbatch.num_targets for microbatch in own))
            actions = self._actions(pipeline.num_stages, len(own)) if own else ()
            for stage, stage_actions in enumerate(actions):
                plan = TrainPlan(step, pipeline.generation, own, stage_actions, total)
                calls.append(pipeline.actors[stage].evaluate.remote(plan, *([reference] if stage == 0 else [])))
        # The stage of the last chunk has them, the others none.
        return [list(losses) for losses in self._get(calls)]

    def _forward_actions(self, stages: int, microbatches: int) -> tuple[tuple[Any, ...], ...]:
        config = self._job.config
        chunks = stages * config.chunks_per_stage
        return make_schedule(
            config.schedule, stages, microbatches, config.chunks_per_stage, first_trainable_chunk=chunks
        ).actions
