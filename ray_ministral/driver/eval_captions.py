"""Captions while a model trains: greedy decoding of a few rows with the weights as they are, on the stages that train.

The same steps as in captioning, each chunk of a stage one after the other; no weight is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from ray_ministral.captioning.batching import BatchScheduler, Finished, Request
from ray_ministral.captioning.plan import StepPlan
from ray_ministral.config import SamplingConfig
from ray_ministral.data.row_reader import RowIndex
from ray_ministral.driver.evaluation import Get, Prepare
from ray_ministral.driver.job import finish_reason
from ray_ministral.driver.pipeline import Pipeline
from ray_ministral.driver.train_job import TrainJob
from ray_ministral.training.samples import PreparedSamples
from ray_ministral.training.targets import TrainSample


@dataclass(frozen=True)
class EvalCaption:
    """One line of `captions.jsonl`: what the model says after `step` steps where a row's last answer is `expected`."""

    step: int
    file: str
    row_group: int
    row: int
    expected: str
    caption: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Row:
    """A whole row of `--eval`: its number, and the reference to its pixels with its place in them."""

    number: int
    sample: TrainSample
    pixels: tuple[Any, int]


class EvalCaptioner:
    """Captions the first `--eval-captions` whole rows."""

    def __init__(
        self, job: TrainJob, rows: RowIndex, pipeline: Pipeline, device: str, prepare: Prepare, get: Get
    ) -> None:
        self._job, self._rows, self._pipeline, self._prepare, self._get = job, rows, pipeline, prepare, get
        self._device = device
        self._sampling = SamplingConfig(max_new_tokens=job.config.eval.max_new_tokens)
        self._whole: list[int] | None = None

    def captions(self, step: int) -> list[EvalCaption]:
        """After `step` steps, in the order of the rows."""
        rows = self._first_whole_rows()
        if not rows:
            return []
        requests = [self._request(row) for row in rows]
        config = self._job.config.pipeline
        scheduler = BatchScheduler(
            microbatches=self._pipeline.num_stages + 1,
            rows_per_microbatch=config.rows_per_microbatch,
            kv_tokens_per_microbatch=max(config.kv_tokens_per_microbatch, *(r.kv_tokens for r in requests)),
            tokens_per_step=config.tokens_in_step(self._device),
            finish_check=partial(finish_reason, sampling=self._sampling, tokenizer=self._job.tokenizer),
        )
        for request in requests:
            scheduler.add(request)
        actors = self._pipeline.actors
        self._get([a.start_captions.remote(self._sampling, config.kv_tokens_per_microbatch) for a in actors])
        try:
            generated = {finished.request.key: finished.request.generated for finished in self._decode(scheduler)}
        finally:
            for actor in actors:
                actor.end_captions.remote()
        return [self._caption(step, row, generated[row.number]) for row in rows]

    def _first_whole_rows(self) -> list[_Row]:
        """Found once, by trying rows in order; later only these are read."""
        wanted = self._job.config.eval.captions
        tried = self._whole if self._whole is not None else range(len(self._rows))
        found: list[_Row] = []
        for start in range(0, len(tried), max(1, wanted)):
            if len(found) >= wanted:
                break
            numbers = tried[start : start + wanted]
            samples, pixels = self._prepare([self._rows.place(number) for number in numbers])
            prepared: PreparedSamples = self._get([samples])[0]
            for index, (number, sample) in enumerate(zip(numbers, prepared.samples, strict=True)):
                if sample is not None:
                    found.append(_Row(number, sample, (pixels, index)))
        found = found[:wanted]
        self._whole = [row.number for row in found]
        return found

    def _request(self, row: _Row) -> Request:
        prompt = row.sample.token_ids[: row.sample.prompt_tokens]
        # The sample has an answer behind the prompt and fits, so there is room for a token at least.
        room = self._job.arch.max_positions - len(prompt)
        return Request(
            key=row.number,
            token_ids=prompt,
            max_new_tokens=min(self._sampling.max_new_tokens, room),
            sample_key=0,  # greedy: nothing is drawn
            pixels=row.pixels if row.sample.image_sizes else None,
        )

    def _decode(self, scheduler: BatchScheduler) -> list[Finished]:
        finished: list[Finished] = []
        in_flight: dict[Any, StepPlan] = {}
        while not scheduler.idle:
            for launch in scheduler.launches():
                in_flight[self._send(launch.plan, launch.blocks)] = launch.plan
            ready, _ = ray.wait(list(in_flight), timeout=self._job.config.pipeline.step_timeout_s)
            done = ready or list(in_flight)  # none in time: let `get` say what hangs
            for reference, tokens in zip(done, self._get(done), strict=True):
                finished += scheduler.complete(in_flight.pop(reference), tokens)
        return finished

    def _send(self, plan: StepPlan, blocks: Sequence[Any]) -> Any:
        """A step through all chunks; the reference to its tokens."""
        actors = self._pipeline.actors
        result = actors[0].caption_step.remote(0, plan, None, *blocks)
        rest = plan.without_token_ids()
        for chunk in range(1, len(actors) * self._job.config.chunks_per_stage):
            result = actors[chunk % len(actors)].caption_step.remote(chunk, rest, result)
        return result

    def _caption(self, step: int, row: _Row, generated: Sequence[int]) -> EvalCaption:
        place, tokenizer = self._rows.place(row.number), self._job.tokenizer
        return EvalCaption(
            step=step,
            file=place.shard.file,
            row_group=place.shard.row_group,
            row=place.row,
            expected=tokenizer.decode(row.sample.last_answer.tolist()),
            caption=tokenizer.decode(generated),
            token_ids=tuple(generated),
        )
