"""`Trainer`: the main loop of a training job: samples of a step, compute on all stages, commit on all stages.

A step is compute, then all ready, then commit. The driver holds token ids, references and numbers; never an image, an
activation or a gradient.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ray_ministral.config import TrainConfig
from ray_ministral.data.row_reader import RowPlace
from ray_ministral.driver.cluster import connected
from ray_ministral.driver.eval_captions import EvalCaptioner
from ray_ministral.driver.evaluation import Evaluator
from ray_ministral.driver.pipeline import describe_error, root_cause
from ray_ministral.driver.sample_actor import start_sample_actor
from ray_ministral.driver.train_actor import train_actor_class
from ray_ministral.driver.train_job import TrainJob
from ray_ministral.driver.train_log import TrainLog
from ray_ministral.driver.train_replicas import start_replicas
from ray_ministral.driver.train_resume import CHECKPOINTS
from ray_ministral.errors import ClusterError, RayMinistralError, StageDiedError
from ray_ministral.pipeline.generators import make_schedule
from ray_ministral.pipeline.schedule import Schedule
from ray_ministral.training.checkpoint import (
    MODEL,
    checkpoint_name,
    prune,
    publish_model,
    remove_attempts,
    temporary_folder,
)
from ray_ministral.training.packing import build_microbatches, num_microbatches
from ray_ministral.training.plan import StageReport, TrainMicrobatch, TrainPlan
from ray_ministral.training.rates import clip_scale, global_norm
from ray_ministral.training.samples import PreparedSamples

logger = logging.getLogger(__name__)

STEPS_AHEAD = 2
"""Steps whose samples are prepared before they are needed."""


@dataclass(frozen=True)
class TrainSummary:
    """What a training job did."""

    steps: int
    first_step: int
    loss: float | None
    seconds: float
    tokens_per_second: float
    skipped_rows: int
    output: str


@dataclass(frozen=True)
class StepResult:
    """One line of `metrics.jsonl`. `step` counts from 1; `loss` is the mean over the step's targets."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    stages: int
    generation: int
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """The share of the step's time, over all stages, in which a stage did not compute."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds) if self.seconds else 0.0


def train(config: TrainConfig, *, train_actor: Any = None) -> TrainSummary:
    """Run a training job to its end; the same call goes on where a stopped one has its last checkpoint.

    `train_actor` is the actor class of the stages, the package's own by default. Raises `UsageError`, `ClusterError`.
    """
    return Trainer(config, train_actor=train_actor).run()


class Trainer:
    """One training job."""

    def __init__(self, config: TrainConfig, *, train_actor: Any = None) -> None:
        self.config = config
        self._actor_class = train_actor
        self._generation = 0

    def run(self) -> TrainSummary:
        """Plan, start, step after step, save, clean up; see `train`."""
        self._job = job = TrainJob.plan_job(self.config)
        if job.resume_from is not None:
            logger.info("going on from %s", job.resume_from)
        started = time.monotonic()
        with ExitStack() as stack:
            self._log = log = stack.enter_context(TrainLog(job.output, job.total_steps, job.first_step))
            stack.enter_context(connected(self.config.address, self.config.pipeline))
            self._ahead: deque[tuple[int, Any, Any]] = deque()
            self._start(stack)
            self._evaluate_first()
            for step in range(job.first_step, job.total_steps):
                begun = time.monotonic()
                prepared, pixels = self._samples(step)
                microbatches = self._pack(prepared)
                reports = self._compute(step, microbatches, pixels)
                norm, rate = self._commit(step, reports)
                seconds = time.monotonic() - begun
                log.step(self._result(step, microbatches, reports, norm, rate, seconds), prepared.skipped)
                # Before the checkpoint: a run that goes on from it needs no evaluation of it.
                if self._evaluation_is_due(step + 1):
                    self._evaluate(step + 1)
                if self._checkpoint_is_due(step + 1):
                    self._save(step + 1)
                    log.draw()
            self._finish()
        return TrainSummary(
            steps=job.total_steps,
            first_step=job.first_step,
            loss=log.last_loss,
            seconds=time.monotonic() - started,
            tokens_per_second=log.tokens_per_second,
            skipped_rows=log.skipped_rows,
            output=str(job.output),
        )

    # Starting

    def _start(self, stack: ExitStack) -> None:
        config, job = self.config.pipeline, self._job
        # Started before the stages: it reads and prepares while they import and load.
        self._sampler = start_sample_actor(job.sample_options)
        stack.callback(ray.kill, self._sampler)
        self._fill()
        self._replicas = start_replicas(
            job, self._actor_class or train_actor_class(), self._generation, self._log.message
        )
        for pipeline in self._replicas:
            stack.callback(pipeline.close)
        self._stages = self._replicas[0].num_stages
        for pipeline in self._replicas:
            pipeline.wait_ready(config.start_timeout_s, self._log.message)
        self._connect()
        remove_attempts(job.output / CHECKPOINTS)
        if job.resume_from is not None:
            self._all("restore", str(job.resume_from))
        self._trainable = self._trainable_chunks()
        self._schedule = lru_cache(maxsize=8)(self._make_schedule)
        self._evaluator = self._captioner = None
        if job.eval_rows is not None:
            self._evaluator = Evaluator(job, job.eval_rows, self._replicas, self._prepare, self._get)
            self._captioner = EvalCaptioner(job, job.eval_rows, self._replicas[0], self._prepare, self._get)

    def _connect(self) -> None:
        """All stages of all replicas meet at the store of the very first one."""
        address = self._get([self._replicas[0].actors[0].serve_store.remote()])[0]
        self._all("join", self._generation, address)

    def _trainable_chunks(self) -> tuple[bool, ...]:
        found = {
            number: trains
            for held in self._get([actor.trainable.remote() for actor in self._replicas[0].actors])
            for number, trains in held.items()
        }
        return tuple(found[number] for number in range(len(found)))

    def _make_schedule(self, microbatches: int) -> Schedule:
        first = self._trainable.index(True)
        frozen = [chunk for chunk, trains in enumerate(self._trainable) if not trains and chunk > first]
        return make_schedule(
            self.config.schedule,
            self._stages,
            microbatches,
            self.config.chunks_per_stage,
            first_trainable_chunk=first,
            frozen_chunks=frozen,
        )

    # A step

    def _fill(self) -> None:
        """Start preparing the samples of the next steps."""
        job = self._job
        next_step = self._ahead[-1][0] + 1 if self._ahead else job.first_step
        while len(self._ahead) < STEPS_AHEAD and next_step < job.total_steps:
            numbers = job.order.step_samples(next_step, self.config.global_batch_size)
            places = [job.rows.place(number) for number in numbers]
            prepared, pixels = self._prepare(places)
            self._ahead.append((next_step, prepared, pixels))
            next_step += 1

    def _prepare(self, places: Sequence[RowPlace]) -> tuple[Any, Any]:
        """References to the samples of some rows and to their pixels."""
        samples, pixels = self._sampler.prepare.options(num_returns=2).remote(places)
        return samples, pixels

    def _samples(self, step: int) -> tuple[PreparedSamples, Any]:
        """The samples of a step and the reference to their pixels."""
        while self._ahead and self._ahead[0][0] < step:
            self._ahead.popleft()
        self._fill()
        number, reference, pixels = self._ahead.popleft()
        assert number == step, f"samples of step {number}, wanted those of step {step}"
        prepared: PreparedSamples = self._get([reference])[0]
        self._fill()
        return prepared, pixels

    def _pack(self, prepared: PreparedSamples) -> list[tuple[TrainMicrobatch, ...]]:
        """The microbatches of each replica, in order, as even in number as can be."""
        wanted = num_microbatches(self.config.global_batch_size, self.config.microbatch_size)
        if not any(sample is not None for sample in prepared.samples):
            return [() for _ in self._replicas]
        microbatches = build_microbatches([prepared.samples], wanted)
        replicas = len(self._replicas)
        ends = [len(microbatches) * (replica + 1) // replicas for replica in range(replicas)]
        return [microbatches[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _compute(self, step: int, microbatches: list[tuple[TrainMicrobatch, ...]], pixels: Any) -> list[StageReport]:
        """Phase one, on every stage of every replica."""
        total = max(1, sum(microbatch.num_targets for own in microbatches for microbatch in own))
        references = []
        for pipeline, own in zip(self._replicas, microbatches, strict=True):
            actions = self._schedule(len(own)).actions if own else ((),) * pipeline.num_stages
            for stage, actor in enumerate(pipeline.actors):
                plan = TrainPlan(step, self._generation, own, actions[stage], total)
                references.append(actor.compute.remote(plan, *([pixels] if stage == 0 else [])))
        reports: list[StageReport] = self._get(references)
        return reports

    def _commit(self, step: int, reports: list[StageReport]) -> tuple[float, float]:
        """Phase two; the norm before clipping, and the learning rate."""
        # Twins have the same gradients after their all-reduce: those of the first replica count.
        norms = {name: norm for report in reports[: self._stages] for name, norm in report.squared_norms.items()}
        norm, rate = global_norm(norms), self._job.learning_rate.at(step)
        self._all("commit", clip_scale(norm, self.config.optimizer.clip_norm), rate)
        return norm, rate

    def _result(
        self,
        step: int,
        microbatches: list[tuple[TrainMicrobatch, ...]],
        reports: list[StageReport],
        norm: float,
        rate: float,
        seconds: float,
    ) -> StepResult:
        every = [microbatch for own in microbatches for microbatch in own]
        targets = max(1, sum(microbatch.num_targets for microbatch in every))
        return StepResult(
            step=step + 1,
            loss=sum(loss for report in reports for loss in report.losses) / targets,
            grad_norm=norm,
            learning_rate=rate,
            tokens=sum(microbatch.num_tokens for microbatch in every),
            seconds=seconds,
            stages=self._stages,
            generation=self._generation,
            busy=tuple(report.busy_seconds for report in reports),
        )

    # Evaluating

    def _evaluation_is_due(self, done: int) -> bool:
        every = self.config.eval.every
        if every is None or done == self._job.total_steps:
            return self._checkpoint_is_due(done)
        return done % every == 0

    def _evaluate_first(self) -> None:
        """Before the first step, unless an earlier run has done so and needs no other now."""
        done, evaluated = self._job.first_step, self._log.evaluated
        if not evaluated or (done not in evaluated and self._evaluation_is_due(done)):
            self._evaluate(done)

    def _evaluate(self, done: int) -> None:
        """Loss and captions after `done` steps, where there is something to evaluate on."""
        if self._evaluator is not None and self._captioner is not None:
            result, skipped = self._evaluator.loss(done)
            self._log.evaluation(result, skipped, self._captioner.captions(done))

    # Saving

    def _checkpoint_is_due(self, done: int) -> bool:
        every = self.config.checkpoint_every
        return done == self._job.total_steps or (every is not None and done % every == 0)

    def _save(self, done: int) -> None:
        """A checkpoint of the first replica after `done` steps, committed whole."""
        folder = self._job.output / CHECKPOINTS
        temporary = str(temporary_folder(folder, done, self._generation))
        actors = self._replicas[0].actors
        parts = self._get([actor.save.remote(temporary) for actor in actors])
        self._get([actors[0].commit_checkpoint.remote(temporary, parts, self._job.state(done))])
        prune(folder, self.config.keep_checkpoints)

    def _finish(self) -> None:
        """The last checkpoint's model becomes `final/`, under `--merge-lora` a whole one."""
        done = self._job.output / CHECKPOINTS / checkpoint_name(self._job.total_steps)
        if not done.exists():  # resumed from a checkpoint of elsewhere, with nothing left to do
            self._save(self._job.total_steps)
        final = self._job.output / "final"
        if self.config.merge_lora:
            self._get([self._replicas[0].actors[0].merge.remote(str(done / MODEL), str(final))])
        else:
            publish_model(done, final)

    # Calls

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """The same call to every stage of every replica, at once."""
        actors = [actor for pipeline in self._replicas for actor in pipeline.actors]
        return self._get([getattr(actor, method).remote(*arguments) for actor in actors])

    def _get(self, references: list[Any]) -> list[Any]:
        """Results of calls, within the step's deadline; one error with its root cause where any of them failed."""
        deadline = time.monotonic() + self.config.pipeline.step_timeout_s
        pending = list(references)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=5.0)
            for reference in done:
                self._raise_failure(reference)
            if pending and time.monotonic() > deadline:
                stuck = [f"stage {i} of {p.name}" for p in self._replicas for i in p.unresponsive()]
                raise StageDiedError(
                    f"{len(pending)} calls have not come back for {self.config.pipeline.step_timeout_s:.0f} s; not "
                    f"answering: {', '.join(stuck) or 'none'}. Raise step_timeout_s if a step can take so long"
                )
        results: list[Any] = ray.get(references)
        return results

    def _raise_failure(self, reference: Any) -> None:
        try:
            ray.get(reference)
        except RayTaskError as error:
            cause = root_cause(error)
            if isinstance(cause, RayMinistralError):
                raise cause from None
            raise ClusterError(f"a step failed: {describe_error(error)}") from error
        except RayActorError as error:
            if self._sampler._actor_id.hex() == error.actor_id:
                raise ClusterError(f"the actor that prepares samples died: {describe_error(error)}") from error
            for pipeline in self._replicas:
                if any(actor._actor_id.hex() == error.actor_id for actor in pipeline.actors):
                    raise pipeline.death(error) from error
            raise StageDiedError(f"a stage died: {describe_error(error)}") from error
        except RayError as error:
            raise ClusterError(f"a step was lost: {describe_error(error)}") from error


def as_line(result: StepResult) -> str:
    """One line of `metrics.jsonl`; numbers with all their digits."""
    values = asdict(result)
    del values["busy"]
    return json.dumps(values)
