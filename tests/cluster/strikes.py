"""Stages and preparing workers that are struck at a certain moment; shared by tests of faults."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from PIL import Image

from ray_ministral.captioning import prepare as prepare_module
from ray_ministral.config import ImageLimits, StageOptions
from ray_ministral.driver import tasks
from ray_ministral.driver.stage_actor import ACTOR_OPTIONS, StageActor


def remote(kind: type[StageActor]) -> Any:
    """As `stage_actor_class` does it."""
    make: Any = ray.remote
    return make(**ACTOR_OPTIONS)(kind)


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_oneself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def prepare_with(before: Callable[[bytes], None]) -> Any:
    """`tasks.prepare` in which `before` is called with the bytes of each image before it is decoded."""

    @ray.remote(num_cpus=0, num_returns="streaming", max_retries=0)
    def prepare(*arguments: Any) -> Iterator[Any]:
        original = prepare_module.open_image

        def open_image(data: bytes, limits: ImageLimits) -> Image.Image:
            before(data)
            return original(data, limits)

        prepare_module.open_image = open_image
        try:
            yield from tasks.prepare._function(*arguments)  # in a worker: the package's own
        finally:
            prepare_module.open_image = original

    return prepare


@dataclass(frozen=True)
class Strike:
    """What happens to the stage that begins at decoder layer `layer`, the first `times` times that `at` is reached.

    at: load; prefill or decode (a step with or without prompts, from the third on); call (of a step, before the stage
    knows of it); restart (after another one died).
    marks: a folder that counts the strikes, with the pid of the process each.
    """

    marks: Path
    at: str
    first: bool | None
    times: int = 1
    strike: Callable[[], None] = kill_oneself

    def fall(self, at: str, spec: Any) -> None:
        """Strike where it is time. A stage is told by whether it is the first or the last; None: neither."""
        mine = not (spec.is_first or spec.is_last) if self.first is None else spec.is_first is self.first
        if at != self.at or not mine or (self.first is False and not spec.is_last):
            return
        done = len(list(self.marks.iterdir()))
        if done < self.times:
            (self.marks / str(done)).write_text(f"{os.getpid()} {time.time()}")
            self.strike()


def struck(*strikes: Strike) -> Any:
    """An actor class with these strikes. Its actors note since when they live in `loads`, beside the first marks."""

    class Struck(StageActor):
        def _fall(self, at: str) -> None:
            for strike in strikes:
                strike.fall(at, self._spec)

        def __init__(self) -> None:
            super().__init__()
            self._born = time.time()

        def load(self, options: StageOptions, *others: Any) -> Any:
            self._spec = options.spec
            with (strikes[0].marks.parent / "loads").open("a") as file:
                file.write(f"{self._born}\n")
            self._fall("load")
            report = super().load(options, *others)
            assert self._stage is not None
            step = self._stage.step

            def struck_step(plan: Any, *rest: Any) -> Any:
                if plan.step >= 3:
                    self._fall("prefill" if plan.prefills else "decode")
                return step(plan, *rest)

            self._stage.step = struck_step  # type: ignore[method-assign]
            return report

        def restart(self, generation: int) -> None:
            self._fall("restart")
            super().restart(generation)

        def step(self, plan: Any, hidden: Any, *blocks: Any) -> Any:
            if plan.step >= 3:
                self._fall("call")
            return super().step(plan, hidden, *blocks)

    return remote(Struck)
