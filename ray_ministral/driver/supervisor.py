"""`Supervisor`: keeps the replicas of a captioning job alive. It learns what happened, asks the policy, and acts.

A replica whose stage dies gives its rows back at once, and the other replicas take them while it recovers: only what
is lost is started again, everything else stays where it is. The pipeline's generation grows, so that nothing of before
can be taken for something of now.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from ray_ministral.captioning.step_times import StageTotals
from ray_ministral.captioning.suspects import Suspects, Verdict
from ray_ministral.config import PipelineConfig
from ray_ministral.driver.places import ANNOUNCE_EVERY_S, Announce
from ray_ministral.driver.policies import Death, Decision, FailurePolicy
from ray_ministral.driver.recovery import Arguments, Recovery
from ray_ministral.driver.replica import Replica
from ray_ministral.driver.spares import Spares
from ray_ministral.driver.watch import Watch
from ray_ministral.errors import ClusterError, StageDiedError

logger = logging.getLogger(__name__)

GiveBack = Callable[[Verdict, StageDiedError], None]
"""Takes the rows of a replica that has lost a stage, and why."""


class Supervisor:
    """Of some replicas."""

    def __init__(
        self,
        config: PipelineConfig,
        replicas: Sequence[Replica],
        arguments: Arguments,
        spares: Spares,
        suspects: Suspects,
        give_back: GiveBack,
    ) -> None:
        self.replicas = list(replicas)
        """Those that work or recover."""
        self.recoveries = 0
        self.recovery_seconds = 0.0
        self.recomputed_tokens = 0
        self._config, self._arguments, self._spares = config, arguments, spares
        self._suspects, self._give_back = suspects, give_back
        self._policy = FailurePolicy(config.max_restarts)
        self._watch = Watch(config)
        self._announced = time.monotonic()

    @property
    def waitables(self) -> list[Any]:
        """What `ray.wait` can wait on for a replica to get further with its recovery."""
        return [ref for replica in self.replicas if replica.recovery for ref in replica.recovery.waitables]

    def start(self, announce: Announce) -> None:
        """Let all stages load, and wait until they are ready, replacing those that die of it."""
        for replica in self.replicas:
            replica.recovery = Recovery(replica.pipeline, self._arguments, self._spares)
        deadline = time.monotonic() + self._config.start_timeout_s
        while self.waitables:
            ray.wait(self.waitables, timeout=ANNOUNCE_EVERY_S / 5)
            self.poll()
            if not self.waitables or time.monotonic() - self._announced < ANNOUNCE_EVERY_S:
                continue
            self._announced = time.monotonic()
            for pipeline in (replica.pipeline for replica in self.replicas if replica.recovery):
                shown = pipeline.progress()
                announce(f"{pipeline.name}: waiting for its stages: {shown}")
                if time.monotonic() > deadline:
                    raise pipeline.not_ready(self._config.start_timeout_s, shown)

    def poll(self) -> None:
        """Go on with what recovers; find what hangs. Waits for nothing. Raises `ClusterError` when nothing is left."""
        self._spares.poll()
        for replica in list(self.replicas):
            for stage, why in list(self._watch.poll(replica.pipeline)):
                if replica in self.replicas:  # not given up for the stage before
                    self._hangs(replica, stage, why)
        for replica in list(self.replicas):
            if replica.recovery is not None:
                self._poll_recovery(replica, replica.recovery)

    def step_lost(self, replica: Replica, error: RayActorError) -> None:
        """A step came back with the death of a stage."""
        if replica.recovery is not None or replica not in self.replicas:
            return  # one death, many errors
        self._stage_died(replica, replica.pipeline.stage_of(error), replica.pipeline.death(error))

    def _hangs(self, replica: Replica, stage: int, why: str) -> None:
        replica.pipeline.end_hanging(stage)
        error = StageDiedError(f"stage {stage} of {replica.pipeline.name} {why}; it was ended")
        self._stage_died(replica, stage, error)

    def _poll_recovery(self, replica: Replica, recovery: Recovery) -> None:
        for stage, error in recovery.poll().items():
            self._stage_died(replica, stage, error)
        for stage in recovery.stuck(self._config.step_timeout_s):
            self._hangs(replica, stage, f"was in a step for {recovery.seconds:.0f} s after another stage had died")
        if replica.recovery is recovery and recovery.is_done:
            replica.recovery = None
            if replica.deaths:
                self.recoveries += 1
                self.recovery_seconds += recovery.seconds
                logger.info("%s works again, after %.1f s", replica.pipeline.name, recovery.seconds)
        elif recovery.seconds > self._longest_recovery() and len(self.replicas) == 1:
            raise StageDiedError(
                f"{replica.pipeline.name} has not recovered for {recovery.seconds:.0f} s ({replica.pipeline.progress()}"
                f"); it lost a stage: {replica.deaths[-1].cause if replica.deaths else 'none'}. Raise "
                "placement_timeout_s or start_timeout_s, or add nodes"
            )
        elif recovery.seconds > ANNOUNCE_EVERY_S and time.monotonic() - self._announced > 2 * ANNOUNCE_EVERY_S:
            self._announced = time.monotonic()
            stages = ", ".join(map(str, sorted(set(recovery.waitables.values()))))
            logger.info(
                "%s recovers for %.0f s: waiting for stage %s, for room or until it has loaded",
                replica.pipeline.name,
                recovery.seconds,
                stages,
            )

    def _longest_recovery(self) -> float:
        return self._config.placement_timeout_s + self._config.start_timeout_s

    def _stage_died(self, replica: Replica, stage: int | None, error: StageDiedError) -> None:
        """`stage` None: nobody knows which; those that do not answer to the call to restart will be found."""
        pipeline, scheduler = replica.pipeline, replica.scheduler
        logger.warning("%s", error)
        verdict = Verdict()
        if replica.recovery is None:
            pipeline.generation += 1
            in_flight, others = scheduler.reset(pipeline.generation)
            self.recomputed_tokens += sum(
                request.known_tokens for request in (*in_flight, *others) if not request.is_new
            )
            replica.in_flight.clear()
            verdict = self._suspects.after_death(in_flight, others)
        if stage is not None:
            before = replica.before.get(stage, StageTotals())
            replica.before[stage] = before.and_also(self._watch.totals(pipeline, stage))
        replica.deaths.append(Death(str(error), replica.rows, verdict.narrowed))
        replica.rows = 0
        decision = self._policy.decide(replica.deaths)
        if decision is Decision.REPLACE:
            lost = [] if stage is None else [stage]
            if replica.recovery is None:
                replica.recovery = Recovery(pipeline, self._arguments, self._spares, lost=lost)
            elif stage is not None:
                replica.recovery.replace(stage)
        else:
            self._retire(replica, error)
        self._give_back(verdict, error)

    def _retire(self, replica: Replica, error: StageDiedError) -> None:
        """A replica that dies again and again. The others go on without it; the last one ends the job."""
        self.replicas.remove(replica)
        replica.pipeline.close()
        deaths = len(replica.deaths)
        message = f"{replica.pipeline.name} is given up after {deaths} deaths of its stages; the last one: {error}"
        if not self.replicas:
            raise ClusterError(
                f"{message}. Every restart ended like this (--max-restarts {self._config.max_restarts}): see to the "
                "cause; the same command then goes on where this one stopped"
            ) from error
        logger.warning("%s; %d others go on", message, len(self.replicas))
