"""`Watch`: asks the stages for their pulse, all along: tells one that is slow from one that hangs.

A stage answers in a thread of its own, whatever it computes. So one that has started, and does not answer for
`health_timeout_s`, is stopped or cut off; one that answers, but has been in one step for longer than `step_timeout_s`,
never comes out of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from ray_ministral.captioning.step_times import StageTotals
from ray_ministral.config import PipelineConfig
from ray_ministral.driver.cluster import alive_nodes
from ray_ministral.driver.pipeline import Pipeline, is_ready
from ray_ministral.driver.stage_actor import Pulse

ASK_EVERY_S = 2.0
LOOK_EVERY_S = 3.0


@dataclass(eq=False)
class _Patient:
    """An actor that is asked: when, and what it answered last (None before its first answer)."""

    actor: Any
    asked: Any = None
    asked_at: float = 0.0
    pulse: Pulse | None = None


class Nodes:
    """Which nodes the cluster has."""

    def __init__(self) -> None:
        self._alive: set[str] = set()
        self._due = 0.0

    def lost(self) -> set[str]:
        """The nodes that have gone since the last call; looks every few seconds."""
        if time.monotonic() < self._due:
            return set()
        self._due = time.monotonic() + LOOK_EVERY_S
        before, self._alive = self._alive, alive_nodes()
        return before - self._alive


class Watch:
    """Of the stages of all replicas."""

    def __init__(self, config: PipelineConfig) -> None:
        self._health_timeout_s, self._step_timeout_s = config.health_timeout_s, config.step_timeout_s
        self._patients: dict[tuple[str, int], _Patient] = {}

    def totals(self, pipeline: Pipeline, stage: int) -> StageTotals:
        """Of the actor that was there last, as it said last."""
        patient = self._patients.get((pipeline.name, stage))
        return StageTotals() if patient is None or patient.pulse is None else patient.pulse.totals

    def poll(self, pipeline: Pipeline) -> Iterator[tuple[int, str]]:
        """Take what has come, ask anew; the stages that hang, and how that shows. Waits for nothing."""
        now = time.monotonic()
        for stage, actor in enumerate(pipeline.actors):
            key = pipeline.name, stage
            patient = self._patients.get(key)
            if patient is None or patient.actor is not actor:
                patient = self._patients[key] = _Patient(actor)
            if patient.asked is not None and is_ready(patient.asked):
                patient.pulse = _answer(patient.asked) or patient.pulse
                patient.asked = None
            if patient.asked is None and now - patient.asked_at >= ASK_EVERY_S:
                patient.asked, patient.asked_at = actor.pulse.remote(), now
            if patient.pulse is None and not is_ready(pipeline.warm_ups[stage]):
                continue  # it may be waiting for room, or importing
            silent = now - patient.asked_at if patient.asked is not None else 0.0
            if silent > self._health_timeout_s:
                yield stage, f"has not answered for {silent:.0f} s (health_timeout_s is {self._health_timeout_s:g})"
            elif patient.pulse is not None and patient.pulse.step_seconds > self._step_timeout_s:
                step = patient.pulse.step_seconds
                limit = f"{self._step_timeout_s:g}; raise it if a step can take so long"
                yield stage, f"has been in one step for {step:.0f} s (step_timeout_s is {limit})"


def _answer(reference: Any) -> Pulse | None:
    try:
        pulse: Pulse = ray.get(reference)
    except RayError:
        return None  # a dead one: its steps or its load say so
    return pulse
