"""Reads the timeline of one of our training runs: the simulator's step against the measured one, memory by stage."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from ray_ministral.pipeline.schedule import COMPUTE, RECEIVES, Action, Kind, Schedule
from ray_ministral.pipeline.simulator import Durations, Timeline, simulate
from ray_ministral.training.durations import measured_durations


@dataclass(frozen=True)
class StageFigures:
    """One stage: the share of the phase in which it computed, its peak memory, activations at once by the simulator."""

    busy: float
    peak_rss: int
    activations: float


@dataclass(frozen=True)
class OurRun:
    """Of the counted steps' first phase, medians: seconds from the first action to the last, measured and simulated."""

    measured: float
    simulated: float
    stages: tuple[StageFigures, ...]

    def table(self) -> str:
        """For people."""
        off = self.simulated / self.measured - 1
        lines = [f"- passes of a step: measured {self.measured:.2f} s, simulated {self.simulated:.2f} s ({off:+.1%})"]
        for number, stage in enumerate(self.stages):
            lines.append(
                f"- stage {number}: computes {stage.busy:.0%} of that, holds {stage.activations:g} microbatches at "
                f"most, peak memory {stage.peak_rss / 1e6:.0f} MB"
            )
        return "\n".join(lines)


def read_run(trace: Path, schedule_name: str, warm_steps: int) -> OurRun:
    """Of a run with one replica and one chunk a stage."""
    steps: dict[int, dict[int, list[tuple[Action, float, float]]]] = defaultdict(lambda: defaultdict(list))
    peaks: dict[int, int] = defaultdict(int)
    for event in json.loads(trace.read_text()):
        values = event.get("args", {})
        if event["ph"] != "X" or event["pid"] == 0:
            continue
        peaks[event["tid"]] = max(peaks[event["tid"]], values.get("peak_rss_bytes", 0))
        if "microbatch" in values:
            action = Action(Kind(event["name"].split()[0]), values["microbatch"], values["chunk"])
            span = (action, event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
            steps[values["step"]][event["tid"]].append(span)
    counted = {number: stages for number, stages in steps.items() if number > warm_steps}
    measured, simulated, busy = [], [], defaultdict(list)
    timeline: Timeline | None = None
    for stages in counted.values():
        begin = min(spans[0][1] for spans in stages.values())
        seconds = max(spans[-1][2] for spans in stages.values()) - begin
        measured.append(seconds)
        timeline = simulate(_schedule(stages, schedule_name), _durations(stages))
        simulated.append(timeline.step_seconds)
        for stage, spans in stages.items():
            waiting = sum(end - start for action, start, end in spans if action.kind in RECEIVES)
            busy[stage].append((spans[-1][2] - spans[0][1] - waiting) / seconds)
    assert timeline is not None, f"{trace} has no step after {warm_steps}"
    figures = tuple(
        StageFigures(median(busy[stage]), peaks[stage], timeline.peak_activations[stage]) for stage in sorted(busy)
    )
    return OurRun(median(measured), median(simulated), figures)


def _schedule(stages: Mapping[int, list[tuple[Action, float, float]]], name: str) -> Schedule:
    """What was run."""
    actions = tuple(tuple(action for action, _, _ in stages[stage]) for stage in sorted(stages))
    microbatches = 1 + max(action.microbatch for row in actions for action in row)
    splits = any(action.kind is Kind.W for row in actions for action in row)
    return Schedule(name, len(actions), 1, microbatches, splits, (True,) * len(actions), actions)


def _durations(stages: Mapping[int, list[tuple[Action, float, float]]]) -> Durations:
    """Means of this step, since its microbatches are not all alike."""
    found: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for spans in stages.values():
        for action, start, end in spans:
            if action.kind in COMPUTE:
                found[action.kind, action.chunk].append(end - start)
    return measured_durations(found, len(stages), mean)
