"""`Trainer`: the main loop of a training job: samples of a step, compute on all stages, commit on all stages.

A step is compute, then all ready, then commit. The driver holds token ids, references and numbers; never an image, an
activation or a gradient.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from typing import Any

import ray

from ray_ministral.config import TrainConfig
from ray_ministral.driver.cluster import connected
from ray_ministral.driver.eval_captions import EvalCaptioner
from ray_ministral.driver.evaluation import Evaluator
from ray_ministral.driver.sample_actor import start_sample_actor
from ray_ministral.driver.trace import Trace
from ray_ministral.driver.train_actor import train_actor_class
from ray_ministral.driver.train_failures import Failures
from ray_ministral.driver.train_feed import SampleFeed
from ray_ministral.driver.train_job import TrainJob
from ray_ministral.driver.train_log import TrainLog
from ray_ministral.driver.train_result import StepResult, TrainSummary
from ray_ministral.driver.train_resume import CHECKPOINTS
from ray_ministral.driver.train_saver import Saver
from ray_ministral.driver.train_stages import TrainStages
from ray_ministral.errors import ClusterError
from ray_ministral.training.checkpoint import (
    MODEL,
    checkpoint_name,
    publish_model,
    remove_attempts,
)
from ray_ministral.training.durations import ScheduleMaker
from ray_ministral.training.packing import build_microbatches, num_microbatches
from ray_ministral.training.plan import StageReport, TrainMicrobatch, TrainPlan
from ray_ministral.training.rates import clip_scale, global_norm
from ray_ministral.training.samples import PreparedSamples

logger = logging.getLogger(__name__)


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

    def run(self) -> TrainSummary:
        """Plan, start, step after step, save, clean up; see `train`."""
        self._job = job = TrainJob.plan_job(self.config)
        if job.resume_from is not None:
            logger.info("going on from %s", job.resume_from)
        started = time.monotonic()
        self._done = job.first_step
        self._failures = Failures(self.config.pipeline.max_restarts)
        with ExitStack() as stack:
            self._log = log = stack.enter_context(TrainLog(job.output, job.total_steps, job.first_step))
            self._trace = stack.enter_context(Trace(self.config.trace))
            stack.enter_context(connected(self.config.address, self.config.pipeline))
            self._start(stack)
            while not self._finished():
                self._recover()
            self._failures.over()
        return TrainSummary(
            steps=job.total_steps,
            first_step=job.first_step,
            loss=log.last_loss,
            seconds=time.monotonic() - started,
            tokens_per_second=log.tokens_per_second,
            skipped_rows=log.skipped_rows,
            output=str(job.output),
            recoveries=self._failures.recoveries,
            recovery_seconds=self._failures.seconds,
            steps_lost=self._failures.steps_lost,
        )

    def _finished(self) -> bool:
        """Do what is left to do; False when something on the way has failed, and there may be a way to go on."""
        try:
            if not self._begun:
                self._begin()
            self._catch_up()
            while self._done < self._job.total_steps:
                self._step(self._done)
            self._finish()
        except ClusterError as error:
            self._failures.note(error)
            self._log.message(f"step {self._done + 1} is void: {error}")
            return False
        return True

    def _step(self, step: int) -> None:
        begun = time.monotonic()
        self._grow(step)
        with self._trace.driver("samples", step=step + 1):
            prepared, pixels = self._feed.samples(step, self._calls.get)
        microbatches = self._pack(prepared)
        with self._trace.driver("compute", step=step + 1):
            reports = self._compute(step, microbatches, pixels)
        with self._trace.driver("commit", step=step + 1):
            norm, rate = self._commit(step, microbatches, reports)
        seconds = time.monotonic() - begun
        self._log.step(self._result(step, microbatches, reports, norm, rate, seconds), prepared.skipped)
        self._done = step + 1
        self._failures.step_done()
        self._saver.poll()
        # Before the checkpoint: a run that goes on from it needs no evaluation of it.
        if self._evaluation_is_due(step + 1):
            self._evaluate(step + 1)
        if self._checkpoint_is_due(step + 1):
            self._save(step + 1)

    # Starting, and starting again

    def _start(self, stack: ExitStack) -> None:
        job = self._job
        # Started before the stages: it reads and prepares while they import and load.
        self._sampler = start_sample_actor(job.sample_options)
        stack.callback(ray.kill, self._sampler)
        self._feed = SampleFeed(job, self._sampler)
        self._live = TrainStages(job, self._actor_class or train_actor_class(), self._log.message)
        self._live.start(stack, self._sampler)
        self._calls = self._live.calls
        self._committing: tuple[int, list[Any]] = (0, [])
        self._begun = False

    def _begin(self) -> None:
        """Let the stages read the model, or the checkpoint that the run goes on from."""
        self._live.use_samples(self._feed.first_samples(self._calls.get))
        remove_attempts(self._job.output / CHECKPOINTS)
        self._done = self._live.begin()
        self._attach()

    def _recover(self) -> None:
        """Void the step under way; let what is left of the stages, and new ones, go on after the last whole step."""
        attempted, self._committing = self._done, (0, [])
        self._feed.forget()
        if self._begun:
            self._saver.abandon(self.config.pipeline.step_timeout_s)
        while True:
            try:
                if not self._begun:  # even the first samples were not to be had
                    self._live.use_samples(self._feed.first_samples(self._calls.get))
                self._done = self._live.recover()
                break
            except ClusterError as error:
                self._failures.note(error)
                self._log.message(f"one more: {error}")
        self._failures.lost(attempted - self._done + (attempted < self._job.total_steps))
        self._log.rewind(self._done)
        remove_attempts(self._job.output / CHECKPOINTS)
        self._attach()
        self._log.message(
            f"going on after step {self._done} with {self._live.num_stages} stages, generation {self._live.generation}"
        )

    def _grow(self, done: int) -> None:
        """Take in one stage more, where one has become ready beside training."""
        if not self._saver.is_busy:
            if self._live.may_grow():
                self._settle()
            if self._live.grow(done):
                self._attach()

    def _attach(self) -> None:
        """What works on the stages that there are now."""
        live, job = self._live, self._job
        self._begun = True
        self._replicas, self._stages = live.replicas, live.num_stages
        self._saver = Saver(job, self._replicas[0], self._calls.get)
        self._schedules = ScheduleMaker(self.config.schedule, self._stages, live.trainable_chunks())
        self._evaluator = self._captioner = None
        if job.eval_rows is not None:
            self._evaluator = Evaluator(job, job.eval_rows, self._replicas, self._feed.prepare, self._calls.get)
            self._captioner = EvalCaptioner(
                job, job.eval_rows, self._replicas[0], live.resolved.device, self._feed.prepare, self._calls.get
            )

    def _catch_up(self) -> None:
        """What is due after the step that the stages are at: at the start, or since a failure got in between."""
        done, evaluated = self._done, self._log.evaluated
        # An earlier run may have evaluated, and need no other now.
        if not evaluated or (done not in evaluated and self._evaluation_is_due(done)):
            self._evaluate(done)
        saved = self._job.output / CHECKPOINTS / checkpoint_name(done)
        due = done > self._job.first_step and self._checkpoint_is_due(done)
        if due and not saved.exists():
            self._save(done)

    # A step

    def _pack(self, prepared: PreparedSamples) -> list[tuple[TrainMicrobatch, ...]]:
        """The microbatches of each replica, in order, as even in number as can be."""
        wanted = num_microbatches(self.config.global_batch_size, self.config.microbatch_size)
        microbatches = build_microbatches([prepared.samples], wanted)
        replicas = len(self._replicas)
        ends = [len(microbatches) * (replica + 1) // replicas for replica in range(replicas)]
        return [microbatches[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _compute(self, step: int, microbatches: list[tuple[TrainMicrobatch, ...]], pixels: Any) -> list[StageReport]:
        """Phase one, on every stage of every replica."""
        total = max(1, _num_targets(microbatches))
        references = []
        for pipeline, own in zip(self._replicas, microbatches, strict=True):
            actions = self._schedules.schedule(len(own)).actions if own else ((),) * pipeline.num_stages
            for stage, actor in enumerate(pipeline.actors):
                plan = TrainPlan(step, self._live.generation, own, actions[stage], total)
                references.append(actor.compute.remote(plan, *([pixels] if stage == 0 else [])))
        self._settle()
        reports: list[StageReport] = self._calls.get(references)
        self._schedules.observe([report.spans for report in reports[: self._stages]])
        for number, report in enumerate(reports):
            self._trace.compute(*divmod(number, self._stages), step + 1, report)
        return reports

    def _commit(
        self, step: int, microbatches: list[tuple[TrainMicrobatch, ...]], reports: list[StageReport]
    ) -> tuple[float, float]:
        """Phase two goes out to all stages; `_settle` waits for it. The norm before clipping, and the learning rate.

        A step without a target changes nothing.
        """
        # Twins have the same gradients after their all-reduce: those of the first replica count.
        norms = {name: norm for report in reports[: self._stages] for name, norm in report.squared_norms.items()}
        norm, rate = global_norm(norms), self._job.learning_rate.at(step)
        scale = clip_scale(norm, self.config.optimizer.clip_norm) if _num_targets(microbatches) else None
        self._committing = step, self._live.commit(step + 1, scale, rate)
        return norm, rate

    def _settle(self) -> None:
        """Wait until the step that was committed last is over on all stages.

        The next step's compute is on its way by then: a stage does one thing after the other, and the driver's own work
        is hidden.
        """
        step, references = self._committing
        self._committing = step, []
        for number, (started, seconds) in enumerate(self._calls.get(references)):
            self._trace.commit(*divmod(number, self._stages), step + 1, started, seconds)

    def _result(
        self,
        step: int,
        microbatches: list[tuple[TrainMicrobatch, ...]],
        reports: list[StageReport],
        norm: float,
        rate: float,
        seconds: float,
    ) -> StepResult:
        return StepResult(
            step=step + 1,
            loss=sum(loss for report in reports for loss in report.losses) / max(1, _num_targets(microbatches)),
            grad_norm=norm,
            learning_rate=rate,
            tokens=sum(microbatch.num_tokens for own in microbatches for microbatch in own),
            seconds=seconds,
            stages=self._stages,
            generation=self._live.generation,
            busy=tuple(report.busy_seconds for report in reports),
        )

    # Evaluating

    def _evaluation_is_due(self, done: int) -> bool:
        every = self.config.eval.every
        if every is None or done == self._job.total_steps:
            return self._checkpoint_is_due(done)
        return done % every == 0

    def _evaluate(self, done: int) -> None:
        """Loss and captions after `done` steps, where there is something to evaluate on."""
        self._settle()
        if self._evaluator is not None and self._captioner is not None:
            with self._trace.driver("evaluation", step=done):
                result, skipped = self._evaluator.loss(done)
                self._log.evaluation(result, skipped, self._captioner.captions(done))

    # Saving

    def _checkpoint_is_due(self, done: int) -> bool:
        every = self.config.checkpoint_every
        return done == self._job.total_steps or (every is not None and done % every == 0)

    def _save(self, done: int) -> None:
        """Begin a checkpoint after `done` steps, and draw the curve so far."""
        self._settle()
        with self._trace.driver("checkpoint", step=done):
            self._saver.begin(done)
        self._log.draw()

    def _finish(self) -> None:
        """The last checkpoint's model becomes `final/`, under `--merge-lora` a whole one."""
        done = self._job.output / CHECKPOINTS / checkpoint_name(self._job.total_steps)
        self._saver.finish()
        if not done.exists():  # resumed from a checkpoint of elsewhere, with nothing left to do
            self._saver.begin(self._job.total_steps)
            self._saver.finish()
        final = self._job.output / "final"
        if self.config.merge_lora:
            self._calls.get([self._replicas[0].actors[0].merge.remote(str(done / MODEL), str(final))])
        else:
            publish_model(done, final)


def _num_targets(microbatches: list[tuple[TrainMicrobatch, ...]]) -> int:
    """Of a step, over all replicas."""
    return sum(microbatch.num_targets for own in microbatches for microbatch in own)
