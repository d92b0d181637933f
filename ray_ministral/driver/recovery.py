"""`Recovery`: a replica on its way to work. Stages that were lost get another actor, which reads their weights; the
others forget their sequences. Waits for nothing: it is polled, and the replicas beside it go on."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ray_ministral.driver.pipeline import Pipeline, describe_error, root_cause
from ray_ministral.driver.spares import Spares
from ray_ministral.errors import ClusterError, StageDiedError

LOOK_EVERY_S = 0.5
"""How often to see whether places were lost."""

Arguments = Sequence[tuple[Any, ...]]
"""What the actor of each stage loads, first to last, without the generation."""


class Recovery:
    """Of one replica. `lost` stages get another actor; with None, all are new and only have to load."""

    def __init__(
        self, pipeline: Pipeline, arguments: Arguments, spares: Spares, *, lost: Collection[int] | None = None
    ) -> None:
        self._pipeline, self._arguments, self._spares = pipeline, arguments, spares
        self.began = time.monotonic()
        self._survivors: set[Any] = set()
        self._look_at = 0.0
        self.waitables: dict[Any, int] = {}
        """What each stage has been asked for."""
        for stage, actor in enumerate(pipeline.actors):
            if lost is None:
                self._load(stage)
            elif stage in lost:
                self.replace(stage)
            else:
                reference = actor.restart.remote(pipeline.generation)
                self.waitables[reference] = stage
                self._survivors.add(reference)

    @property
    def is_done(self) -> bool:
        """Whether all stages are ready."""
        return not self.waitables

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def replace(self, stage: int) -> None:
        """Another actor for a stage: a spare where there is one, else a new one, when there is room."""
        self.waitables = {reference: other for reference, other in self.waitables.items() if other != stage}
        if not self._spares.stand_in(self._pipeline, stage):
            self._pipeline.replace(stage)
        self._load(stage)

    def _look_after_places(self) -> None:
        """Those that wait for room, or load, at a place that is lost, wait somewhere else."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_EVERY_S
        for stage in [stage for reference, stage in self.waitables.items() if reference not in self._survivors]:
            if self._pipeline.places[stage].is_lost:
                self.replace(stage)

    def poll(self) -> dict[int, StageDiedError]:
        """The stages that have died since the last call. Raises what is wrong with the model or the package."""
        self._look_after_places()
        dead: dict[int, StageDiedError] = {}
        ready, _ = ray.wait(list(self.waitables), num_returns=len(self.waitables), timeout=0)
        for reference in ready:
            stage = self.waitables.pop(reference)
            try:
                report = ray.get(reference)
            except RayError as error:
                dead[stage] = self._death(stage, error)
            else:
                if report is not None:
                    self._pipeline.loaded[stage] = report
        return dead

    def stuck(self, timeout_s: float) -> list[int]:
        """Stages that were to forget their sequences, and have not come to it for so long."""
        if self.seconds <= timeout_s:
            return []
        return [stage for reference, stage in self.waitables.items() if reference in self._survivors]

    def _load(self, stage: int) -> None:
        actor = self._pipeline.actors[stage]
        self.waitables[actor.load.remote(*self._arguments[stage], self._pipeline.generation)] = stage

    def _death(self, stage: int, error: RayError) -> StageDiedError:
        """What a stage died of. Raises what is no death."""
        cause = root_cause(error)
        if isinstance(cause, RayActorError):
            return self._pipeline.death(cause)
        if isinstance(error, RayTaskError):
            raise self._pipeline.cannot_load(stage, error) from error
        raise ClusterError(f"{self._pipeline.name}: stage {stage} was lost: {describe_error(error)}") from error
