"""`Captioner`: the main loop of a captioning job: prepare rows ahead, step them through the pipelines, write parts.

It holds references, row keys and token ids; never an image or an activation.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError

from ray_ministral.captioning.batching import BatchScheduler, Finished, Request
from ray_ministral.captioning.plan import StepPlan
from ray_ministral.captioning.request import OK, PreparedRow, RowFailure, RowResult
from ray_ministral.captioning.suspects import Verdict
from ray_ministral.config import CaptionConfig, StageOptions
from ray_ministral.driver import tasks
from ray_ministral.driver.clock import Clock
from ray_ministral.driver.cluster import Resolved, connected, resolve
from ray_ministral.driver.feeder import Feeder, Prepared
from ray_ministral.driver.job import CaptionJob
from ray_ministral.driver.lost_rows import LostRows
from ray_ministral.driver.part_writer import PartWriter
from ray_ministral.driver.parts import PartTracker
from ray_ministral.driver.pipeline import NewActor, Pipeline, root_cause
from ray_ministral.driver.policies import too_many_errors
from ray_ministral.driver.profiling import Profiling
from ray_ministral.driver.progress import Progress
from ray_ministral.driver.replica import Replica, RowKey, sample_key
from ray_ministral.driver.spares import Spares
from ray_ministral.driver.stage_actor import stage_actor_class
from ray_ministral.driver.step_spans import StepSpans
from ray_ministral.driver.summary import CaptionSummary, StageFigures
from ray_ministral.driver.supervisor import Supervisor
from ray_ministral.driver.trace import Trace
from ray_ministral.driver.watch import Nodes
from ray_ministral.errors import (
    ClusterError,
    StageDiedError,
    TooManyErrorsError,
)

logger = logging.getLogger(__name__)

WAIT_S = 1.0
"""Longest wait for an event before progress is shown again."""


def caption(config: CaptionConfig, *, stage_actor: Any = None) -> CaptionSummary:
    """Run a captioning job to its end.

    `stage_actor` is the actor class of the stages, the package's own by default. Raises `UsageError` for what the
    caller can mend, `TooManyErrorsError`, `ClusterError`; the same call goes on where a stopped one has committed.
    """
    return Captioner(config, stage_actor=stage_actor).run()


def describe(config: CaptionConfig) -> str:
    """What `caption` would do, for people; starts and writes nothing. Raises `UsageError` as `caption` does."""
    return CaptionJob.plan_job(config, create=False).describe()


class Captioner:
    """One captioning job."""

    def __init__(self, config: CaptionConfig, *, stage_actor: Any = None) -> None:
        self.config = config
        self._actor_class = stage_actor
        self._clock = Clock()
        self._supervisor: Supervisor | None = None
        self._nodes = Nodes()

    @property
    def _replicas(self) -> list[Replica]:
        return self._supervisor.replicas if self._supervisor else []

    def run(self) -> CaptionSummary:
        """Plan, start, loop until every part is committed, clean up; see `caption`."""
        job = CaptionJob.plan_job(self.config)
        self._clock.lap("plan")
        with closing(job.ledger):
            if job.finished is not None:
                logger.info("%s is finished already: nothing to do", job.ledger.output)
                return job.finished
            summary = self._run(job)
            job.ledger.finish(summary.to_json())
            return summary

    def _run(self, job: CaptionJob) -> CaptionSummary:
        with ExitStack() as stack:
            self._job, self._split = job, job.split
            self._tracker = PartTracker(job.plan.shards, job.committed, job.failed_rows)
            self._trace = stack.enter_context(Trace(self.config.trace))
            progress = self._progress = stack.enter_context(Progress(job.plan.rows, self._tracker.done_before))
            if not self._tracker.done:
                self._start(stack)
            while not self._tracker.done:
                self._admit()
                self._launch()
                self._handle_events()
                self._supervise()
                self._note_commits()
                self._spans.poll()
                progress.update(**vars(self._tracker.totals))
            summary = self._summary()
            for line in self._split.outcome(summary.stage_busy):
                progress.message(line)
            return summary

    # Starting

    def _start(self, stack: ExitStack) -> None:
        """Everything that `stack` will take away again: the cluster, the tasks that prepare rows, the pipelines."""
        with self._trace.driver("cluster"):
            stack.enter_context(connected(self.config.address, self.config.pipeline))
        self._clock.lap("cluster")
        self._feeder = Feeder(self._tracker.wanted(), self._start_prepare, self.config.images.deadline_s)
        stack.callback(self._feeder.close)
        self._lost = LostRows(self._job.plan.shards, self._feeder, self._give_up)
        with self._trace.driver("stages"):
            self._supervisor = self._start_replicas(stack)
        self._spans = StepSpans(self._trace, [replica.pipeline for replica in self._replicas])
        stack.callback(self._spans.finish)
        writer = PartWriter(self._job, self._trace, with_token_ids=self.config.with_token_ids)
        self._writer = stack.enter_context(writer)
        self._progress_at = time.monotonic()

    def _start_replicas(self, stack: ExitStack) -> Supervisor:
        config = self.config.pipeline
        resolved = resolve(config)
        actor_class = self._actor_class or stage_actor_class()
        pipelines: list[Pipeline] = []
        for index in range(config.replicas):
            pipeline = Pipeline.start(
                f"replica {index}",
                actor_class=actor_class,
                num_stages=config.stages,
                config=config,
                resolved=resolved,
                announce=self._progress.message,
            )
            stack.callback(pipeline.close)
            pipelines.append(pipeline)
        spares = Spares(config.spares, NewActor(actor_class, resolved))
        stack.callback(spares.close)
        self._clock.lap("placement")
        measuring = self._choose_split(pipelines, resolved)
        arguments = [
            (
                StageOptions(self._job.model_dir, spec, resolved.device, resolved.dtype, resolved.threads),
                self.config.sampling,
                config.kv_tokens_per_microbatch,
                self._trace.is_on,
            )
            for spec in self._split.partition.stages
        ]
        replicas = [Replica(pipeline, self._scheduler(resolved)) for pipeline in pipelines]
        supervisor = Supervisor(config, replicas, arguments, spares, self._lost.suspects, self._stage_died)
        supervisor.start(self._progress.message)
        reports = [report for replica in supervisor.replicas for report in replica.pipeline.loaded.values()]
        slowest = max(reports, key=lambda report: report.import_seconds + report.load_seconds)
        self._clock.lap("stages", imports=slowest.import_seconds, measuring=measuring, weights=slowest.load_seconds)
        return supervisor

    def _choose_split(self, pipelines: list[Pipeline], resolved: Resolved) -> float:
        """Where to cut the model; returns the seconds that the stages measured for."""
        job, announce = self._job, self._progress.message
        rows = job.plan.rows - self._tracker.done_before
        profiling = Profiling(self.config, job.arch, job.model_dir, rows, resolved, announce)
        self._split = profiling.choose(job.split, pipelines, self._feeder)
        announce(self._split.describe())
        return profiling.seconds

    def _scheduler(self, resolved: Resolved) -> BatchScheduler:
        config = self.config.pipeline
        return BatchScheduler(
            microbatches=config.microbatches,
            rows_per_microbatch=config.rows_per_microbatch,
            kv_tokens_per_microbatch=config.kv_tokens_per_microbatch,
            tokens_per_step=config.tokens_in_step(resolved.device),
            finish_check=self._job.finish_check,
        )

    def _start_prepare(self, shards: Any) -> Any:
        job, config = self._job, self.config
        limit_column = config.sampling.max_new_tokens_column
        return tasks.start_prepare(
            shards, job.model_dir, config.prompt, config.images, job.max_prompt_tokens, limit_column
        )

    # The loop: admit rows, launch steps, handle what comes back

    def _admit(self) -> None:
        """Hand rows to the replica with most room, as long as one has any: those without a replica first."""
        with self._trace.driver("admit"):
            while self._house() if self._lost.are_homeless else self._admit_chunk():
                pass

    def _house(self) -> bool:
        return self._lost.house(max(self._replicas, key=lambda replica: replica.room))

    def _wants_rows(self) -> bool:
        """Whether there is room for more on a stage, and for what comes of them at the output."""
        return any(replica.room for replica in self._replicas) and not self._writer.is_full

    def _admit_chunk(self) -> bool:
        """The next chunk, if there is room and one is ready."""
        replica = max(self._replicas, key=lambda replica: replica.room)
        prepared = self._feeder.take() if self._wants_rows() else None
        if prepared is None:
            return False
        chunk = prepared.chunk
        if chunk.seconds:
            rows = f"{chunk.rows[0].row} to {chunk.rows[-1].row}"
            self._trace.beside("prepare", chunk.started, chunk.seconds, rows=rows, shard=chunk.shard_index)
        for index, row in enumerate(chunk.rows):
            self._admit_row(replica, prepared, index, row)
        return True

    def _admit_row(self, replica: Replica, prepared: Prepared, index: int, row: PreparedRow) -> None:
        shard_index = prepared.chunk.shard_index
        if row.token_ids is None:
            assert row.failure is not None
            self._file(shard_index, RowResult.failed(row.row, row.failure))
            return
        self._clock.first_admission()
        pixels = (prepared.pixels, index) if row.image_sizes else None
        if (again := self._lost.prepared_again(shard_index, row.row, pixels)) is not None:
            replica.scheduler.add(again)
            return
        images = self._job.image_tokens(row.image_sizes)
        most = self.config.sampling.max_new_tokens
        request = Request(
            key=RowKey(shard_index, row.row, len(row.image_sizes), images),
            token_ids=row.token_ids,
            max_new_tokens=most if row.max_new_tokens is None else min(most, row.max_new_tokens),
            sample_key=sample_key(self._job.plan.shards[shard_index], row.row),
            pixels=pixels,
            pixel_bytes=sum(3 * height * width for height, width in row.image_sizes),
        )
        replica.scheduler.add(request)

    def _launch(self) -> None:
        """Send a step of every microbatch that waits for one."""
        with self._trace.driver("launch"):
            for replica in self._replicas:
                replica.launch()

    def _handle_events(self) -> None:
        """Wait for whatever comes first: tokens, a chunk, a written part."""
        steps = {reference: replica for replica in self._replicas for reference in replica.in_flight}
        waitables = [*steps, *self._writer.waitables, *(self._supervisor.waitables if self._supervisor else ())]
        if self._wants_rows() and self._feeder.waitable() is not None:
            waitables.append(self._feeder.waitable())
        if not waitables:
            assert not self._writer.is_idle, "rows are missing, and nothing is under way that could bring them"
            if not self._writer.wait_for_commit(WAIT_S):
                self._check_for_hang()
            return
        with self._trace.driver("wait"):
            ray.wait(waitables, num_returns=1, timeout=WAIT_S, fetch_local=False)
            ready, _ = ray.wait(waitables, num_returns=len(waitables), timeout=0, fetch_local=False)
        if not ready:
            self._check_for_hang()
            return
        self._progress_at = time.monotonic()
        for reference in ready:
            if reference in steps:
                with self._trace.driver("complete"):
                    self._step_done(steps[reference], reference)
            elif reference in self._writer.waitables:
                self._writer.written(reference)

    def _step_done(self, replica: Replica, reference: Any) -> None:
        plan = replica.in_flight.pop(reference, None)
        if plan is None:
            return  # the replica has lost a stage since
        try:
            tokens: np.ndarray = ray.get(reference)
        except RayError as error:
            self._step_failed(replica, plan, error)
            return
        for finished in replica.scheduler.complete(plan, tokens):
            replica.rows += 1
            self._file(finished.request.key.shard_index, self._captioned(finished), finished.request.key.images)

    def _step_failed(self, replica: Replica, plan: StepPlan, error: RayError) -> None:
        cause = root_cause(error)
        if isinstance(cause, RayActorError):
            assert self._supervisor is not None
            self._supervisor.step_lost(replica, cause)
        else:
            self._lost.step_failed(replica, self._replicas, plan, error)

    def _stage_died(self, verdict: Verdict, error: StageDiedError) -> None:
        self._progress_at = time.monotonic()
        self._lost.stage_died(verdict, error)

    def _give_up(self, request: Request, failure: RowFailure) -> None:
        key: RowKey = request.key
        result = RowResult.failed(
            key.row,
            failure,
            prompt_tokens=len(request.token_ids),
            image_tokens=key.image_tokens,
            attempts=request.attempts,
        )
        self._file(key.shard_index, result, key.images)

    def _captioned(self, finished: Finished) -> RowResult:
        request, key = finished.request, finished.request.key
        return RowResult(
            row=key.row,
            caption=self._job.caption_of(request.generated),
            status=OK,
            error=None,
            error_stage=None,
            finish_reason=finished.finish_reason,
            prompt_tokens=len(request.token_ids),
            image_tokens=key.image_tokens,
            completion_tokens=len(request.generated),
            attempts=request.attempts,
            token_ids=tuple(request.generated) if self.config.with_token_ids else None,
        )

    def _file(self, shard_index: int, result: RowResult, images: int = 0) -> None:
        """Note a row's result; start writing the part if its shard is whole."""
        results = self._tracker.add(shard_index, result, images)
        shard = self._job.plan.shards[shard_index]
        rows, errors = self._job.plan.rows, self._tracker.errors
        done = self._tracker.done_before + self._tracker.totals.rows
        if too_many_errors(errors, done, rows, self.config.max_error_rate):
            of = f"{rows} rows" if errors > self.config.max_error_rate * rows else f"the first {done} rows"
            raise TooManyErrorsError(
                f"{errors} of {of} failed, more than --max-error-rate {self.config.max_error_rate:g} allows; the last "
                f"one, row {result.row} of row group {shard.row_group} of {shard.file}: {result.status}: "
                f"{result.error}"
            )
        if results is not None:
            self._writer.write(shard_index, results, generation=self._generation())

    def _generation(self) -> int:
        return max((replica.pipeline.generation for replica in self._replicas), default=0)

    def _note_commits(self) -> None:
        """Parts that have come into the ledger."""
        for commit in self._writer.committed():
            self._tracker.committed(commit.shard_index, commit.info)
            self._clock.last_commit()
            self._progress_at = time.monotonic()

    def _supervise(self) -> None:
        if self._supervisor is not None:
            self._supervisor.poll()
        if lost := self._nodes.lost():
            logger.warning("lost nodes: %s; what was being prepared is begun again", ", ".join(sorted(lost)))
            self._feeder.begin_again()

    def _check_for_hang(self) -> None:
        """Nothing has come back for a while. Stages that hang are found by the supervisor, what else does is here."""
        silent = time.monotonic() - self._progress_at
        config = self.config.pipeline
        if any(replica.recovery for replica in self._replicas):
            return  # it has a deadline of its own
        steps = sum(len(replica.in_flight) for replica in self._replicas)
        # A step that hangs is given up at its time-out, and its stage replaced; only then it is for us to end the job.
        if silent < config.step_timeout_s + (2 * config.health_timeout_s if steps else 0.0):
            return
        if not steps and not self._writer.waitables and self._feeder.restart_stuck(silent):
            self._progress_at = time.monotonic()
            return
        under_way = [f"{steps} steps"] if steps else []
        under_way += self._writer.under_way
        under_way += [f"the preparing of {place}" for place in self._feeder.under_way()]
        raise ClusterError(
            f"nothing has come back for {silent:.0f} s, though all stages answer; under way: {', '.join(under_way)}. "
            "Raise step_timeout_s if this can take so long"
        )

    # The end

    def _summary(self) -> CaptionSummary:
        counts = self._tracker.status_counts
        totals, clock, config = self._tracker.totals, self._clock, self.config.pipeline
        seconds, supervisor = clock.working_seconds, self._supervisor
        figures = StageFigures.of([replica.totals() for replica in self._replicas], config.stages, seconds)
        return CaptionSummary(
            rows=sum(counts.values()),
            ok=counts.get(OK, 0),
            errors=sum(counts.values()) - counts.get(OK, 0),
            seconds=clock.seconds,
            startup_seconds=clock.startup_seconds,
            images_per_second=totals.images / seconds if seconds else 0.0,
            generated_tokens_per_second=totals.tokens / seconds if seconds else 0.0,
            stages=config.stages,
            replicas=config.replicas,
            stage_busy=figures.stage_busy,
            recoveries=0 if supervisor is None else supervisor.recoveries,
            recovery_seconds=0.0 if supervisor is None else supervisor.recovery_seconds,
            recomputed_tokens=0 if supervisor is None else supervisor.recomputed_tokens,
            output=self._job.ledger.output,
            status_counts=counts,
            startup=clock.laps,
            bubble=figures.bubble,
            steps=figures.steps,
            tokens_per_step=figures.tokens_per_step,
            model_seconds=figures.model_seconds,
            outside_seconds=figures.outside_seconds,
            layers_per_stage=list(self._split.partition.layers_per_stage),
            estimated_share=list(self._split.shares),
            split_by=self._split.by,
        )
