"""The thin Ray skin around a `CaptionStage`: when it imports, what it is asked while it works, which resources it has.

`StageActor` is a plain class that imports nothing heavy until `warm_up`; `stage_actor_class` makes it remote. The
driver uses it by default, `actors/` hands the same thing to the command line.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from ray_ministral.captioning.plan import StepPlan
from ray_ministral.captioning.request import Pixels
from ray_ministral.captioning.step_times import StageTotals, StepSpan
from ray_ministral.config import SamplingConfig, StageOptions

if TYPE_CHECKING:
    from ray_ministral.captioning.costs import Profile, Shapes
    from ray_ministral.captioning.stage import CaptionStage

HEALTH = "health"
"""Concurrency group of calls that answer while the stage computes."""


@dataclass(frozen=True)
class StageStatus:
    """Where a stage is: `phase` is starting, importing, measuring, loading or ready; bytes of weights read so far."""

    phase: str
    loaded_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True)
class Pulse:
    """What a stage answers whatever it is doing: seconds that its step under way takes so far, sums of the others."""

    step_seconds: float = 0.0
    totals: StageTotals = field(default_factory=StageTotals)


@dataclass(frozen=True)
class LoadReport:
    """What a stage's start cost: seconds for imports and for weights, bytes of its parameters and of its process."""

    pid: int
    node_id: str
    import_seconds: float
    load_seconds: float
    parameter_bytes: int
    peak_rss_bytes: int


class StageActor:
    """One stage of one pipeline, in a process of its own. Which one it is, it learns in `load`."""

    def __init__(self) -> None:
        self._status = StageStatus("starting")
        self._stage: CaptionStage | None = None
        self._import_seconds = 0.0
        self._step_began: float | None = None

    def warm_up(self) -> None:
        """Import torch and megatron."""
        self._status = StageStatus("importing")
        started = time.perf_counter()
        from ray_ministral.captioning.stage import CaptionStage  # noqa: F401

        self._import_seconds = time.perf_counter() - started

    def profile(self, options: StageOptions, sampling: SamplingConfig, shapes: Shapes) -> Profile:
        """See `captioning.profile`; between `warm_up` and `load`."""
        from ray_ministral.captioning.profile import measure

        self._status = StageStatus("measuring")
        return measure(options, sampling, shapes)

    def load(
        self,
        options: StageOptions,
        sampling: SamplingConfig,
        kv_tokens_per_microbatch: int,
        traced: bool = False,
        generation: int = 0,
    ) -> LoadReport:
        """Read the weights of a stage of a pipeline's `generation`. A `traced` one keeps its steps for `take_spans`."""
        from ray_ministral.captioning.stage import CaptionStage

        self._stage = CaptionStage(options, sampling, kv_tokens_per_microbatch, traced=traced, generation=generation)
        load_seconds = self._stage.load(self._loading)
        memory = self._stage.memory()
        self._status = StageStatus("ready", memory["parameters"], memory["parameters"])
        return LoadReport(
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
            import_seconds=self._import_seconds,
            load_seconds=load_seconds,
            parameter_bytes=memory["parameters"],
            peak_rss_bytes=memory["peak_rss"],
        )

    def _loading(self, done: int, total: int) -> None:
        self._status = StageStatus("loading", done, total)

    def step(self, plan: StepPlan, hidden: np.ndarray | None, *blocks: Pixels) -> np.ndarray:
        """See `CaptionStage.step`."""
        assert self._stage is not None, "load() comes first"
        self._step_began = time.monotonic()
        try:
            return self._stage.step(plan, hidden, *blocks)
        finally:
            self._step_began = None

    def restart(self, generation: int) -> None:
        """See `CaptionStage.restart`. Comes after the steps that were sent before it."""
        assert self._stage is not None, "load() comes first"
        self._stage.restart(generation)

    @ray.method(concurrency_group=HEALTH)
    def status(self) -> StageStatus:
        """Answers at once, whatever the stage is doing."""
        return self._status

    @ray.method(concurrency_group=HEALTH)
    def pulse(self) -> Pulse:
        """Answers at once, whatever the stage is doing."""
        began = self._step_began
        return Pulse(0.0 if began is None else time.monotonic() - began, self._totals())

    @ray.method(concurrency_group=HEALTH)
    def totals(self) -> StageTotals:
        """What its steps took so far."""
        return self._totals()

    def _totals(self) -> StageTotals:
        return StageTotals() if self._stage is None else self._stage.times.totals

    @ray.method(concurrency_group=HEALTH)
    def take_spans(self) -> list[StepSpan]:
        """The steps since the last call; none where it is not traced."""
        return [] if self._stage is None else self._stage.times.take()


ACTOR_OPTIONS: dict[str, Any] = {
    "max_restarts": 0,
    "max_task_retries": 0,
    "concurrency_groups": {HEALTH: 1},
    "allow_out_of_order_execution": True,
}
"""Ray restarts and retries nothing: the driver decides what a death means. Nor may Ray keep calls in order: else one
whose input is not there yet, of a stage that hangs, would hold up all later ones, those to the health group too, and
stages behind would seem to hang. Microbatches do not depend on one another; steps of an old generation are refused."""


def stage_actor_class() -> Any:
    """`StageActor` as a Ray actor class."""
    remote: Any = ray.remote  # its type stubs lack concurrency groups
    return remote(**ACTOR_OPTIONS)(StageActor)
