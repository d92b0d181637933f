"""`StepSpans`: from the stages of a captioning job into its timeline, every few seconds, so that stages keep little."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from ray_ministral.driver.pipeline import Pipeline
from ray_ministral.driver.trace import Trace

TAKE_EVERY_S = 2.0
FINISH_TIMEOUT_S = 5.0


class StepSpans:
    """Asks the stages of all replicas for their steps and writes those that have come, where there is a timeline."""

    def __init__(self, trace: Trace, replicas: Sequence[Pipeline]) -> None:
        self._trace = trace
        self._replicas = list(replicas)
        self._asked: dict[Any, tuple[int, int]] = {}
        self._due = time.monotonic() + TAKE_EVERY_S

    def poll(self) -> None:
        """Write what has come, ask anew. Waits for nothing; asks no stage that has not answered yet."""
        if not self._trace.is_on or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + TAKE_EVERY_S
        self._collect(0)
        waiting = set(self._asked.values())
        for place in self._places() - waiting:
            self._ask(place)

    def finish(self) -> None:
        """Write all the rest, of stages that answer within a few seconds. Never raises."""
        if self._trace.is_on:
            with suppress(Exception):
                for place in self._places():
                    self._ask(place)
                self._collect(FINISH_TIMEOUT_S)

    def _places(self) -> set[tuple[int, int]]:
        """Each stage of each replica; who plays it may change."""
        return {(i, stage) for i, pipeline in enumerate(self._replicas) for stage in range(pipeline.num_stages)}

    def _ask(self, place: tuple[int, int]) -> None:
        replica, stage = place
        self._asked[self._replicas[replica].actors[stage].take_spans.remote()] = place

    def _collect(self, timeout_s: float) -> None:
        if not self._asked:
            return
        ready, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=timeout_s)
        for reference in ready:
            replica, stage = self._asked.pop(reference)
            with suppress(RayError):  # a stage that has died: the steps that it was to do say so
                for span in ray.get(reference):
                    self._trace.step(replica, stage, span)
        self._trace.flush()
