"""Stages in training that are struck at a certain moment of a certain step; shared by tests of faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from ray_ministral.driver.stage_actor import HEALTH
from ray_ministral.driver.train_actor import FILES, TrainActor
from ray_ministral.training.plan import TrainPlan
from tests.cluster.strikes import kill_oneself


@dataclass(frozen=True)
class TrainStrike:
    """What happens to the stage number `stage`, once, in step `step` (from 1) when `at` is reached.

    at: load; forward, backward (of the second microbatch); optimizer (its step is done for some parameters); committed;
    save, written; give, change (while migrating; `step` is the number of steps done).
    marks: a folder in which a file says that it has happened.
    """

    marks: Path
    at: str
    stage: int
    step: int
    strike: Callable[[], None] = kill_oneself
    times: int = 1

    def fall(self, at: str, stage: int, step: int) -> None:
        if (at, stage, step) == (self.at, self.stage, self.step):
            for number in range(self.times):
                try:
                    (self.marks / f"{at}-{stage}-{step}-{number}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                self.strike()
                return


def struck(*strikes: TrainStrike) -> Any:
    """An actor class with these strikes."""

    class Struck(TrainActor):
        _step = 0

        def _fall(self, at: str, step: int) -> None:
            for strike in strikes:
                strike.fall(at, self._options.stage, step)

        def load(self, options: Any, done: int | None = None) -> Any:
            self._options = options
            self._fall("load", 0 if done is None else done)
            return super().load(options, done)

        def compute(self, plan: TrainPlan, *blocks: Any) -> Any:
            self._step = plan.step + 1
            stage = self.stage
            for name in ("forward", "backward"):
                original = getattr(type(stage), f"_{name}")

                def wrapped(key: Any, *rest: Any, name: str = name, original: Any = original) -> Any:
                    if key[0] == 1:
                        self._fall(name, self._step)
                    return original(stage, key, *rest)

                setattr(stage, f"_{name}", wrapped)
            return super().compute(plan, *blocks)

        def commit(self, done: int, scale: float | None, rate: float, *, copied: bool) -> Any:
            optimizer = self.stage.optimizer
            if scale is not None:
                step = type(optimizer).step

                def struck_step(scale: float, rate: float) -> None:
                    step(optimizer, scale, rate)
                    self._fall("optimizer", done)

                optimizer.step = struck_step  # type: ignore[method-assign]
            result = super().commit(done, scale, rate, copied=copied)
            if scale is not None:
                self._fall("committed", done)
            return result

        def save(self, folder: str) -> None:
            super().save(folder)
            self._fall("save", self._step)

        @ray.method(concurrency_group=FILES)
        def written(self) -> Any:
            self._fall("written", self._step)
            return super().written()

        def give(self, pieces: Any) -> Any:
            self._fall("give", self._step)
            return super().give(pieces)

        def change(self, options: Any, done: int, again: Any, *parcels: Any) -> None:
            super().change(options, done, again, *parcels)
            self._fall("change", done)

    make: Any = ray.remote
    return make(max_restarts=0, max_task_retries=0, concurrency_groups={HEALTH: 1, FILES: 1})(Struck)


def fallen(marks: Path) -> list[str]:
    """The strikes that have fallen, in the order of their names."""
    return sorted(path.name for path in marks.iterdir())
