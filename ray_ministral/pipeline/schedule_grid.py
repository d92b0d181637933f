"""`render`: a schedule or a simulated step as a grid of text, one row a stage. For people; nothing reads it back."""

from __future__ import annotations

from ray_ministral.pipeline.schedule import Action, Kind, Schedule
from ray_ministral.pipeline.simulator import Durations, Timeline, simulate

IDLE = "."
FILL = {Kind.F: ">", Kind.B: "<", Kind.W: "="}
"""What fills an action drawn to scale: where its result goes (to the next stage, the previous one, or nowhere)."""


def render(what: Schedule | Timeline, width: int = 100) -> str:
    """A grid of equal cells for a schedule, one drawn to scale for a timeline.

    In the first each action takes one cell, as if all took equally long; a cell is `F3` (kind and microbatch), or
    `F3.4` (and chunk) where stages have several chunks. In the second `width` columns stand for the whole step, and
    actions too short for their name show what fits of it.
    """
    if isinstance(what, Schedule):
        return _cells(what)
    if width < 1:
        raise ValueError(f"a grid needs a width of at least 1 column, got {width}")
    return _to_scale(what, width)


def _label(schedule: Schedule, action: Action) -> str:
    return str(action) if schedule.chunks_per_stage > 1 else f"{action.kind}{action.microbatch}"


def _row(stage: int, num_stages: int, text: str) -> str:
    return f"stage {stage:>{len(str(num_stages - 1))}} |{text}|"


def _cells(schedule: Schedule) -> str:
    ones = (1,) * schedule.num_chunks
    timeline = simulate(schedule, Durations(ones, ones, ones, ones))
    size = max(len(_label(schedule, span.action)) for row in timeline.spans for span in row)
    lines = []
    for stage, row in enumerate(timeline.spans):
        cells = [IDLE] * int(timeline.step_seconds)
        for span in row:
            cells[int(span.start)] = _label(schedule, span.action)
        lines.append(_row(stage, schedule.num_stages, " ".join(cell.ljust(size) for cell in cells)))
    return "\n".join(lines)


def _to_scale(timeline: Timeline, width: int) -> str:
    schedule = timeline.schedule
    columns = width / timeline.step_seconds if timeline.step_seconds else 0.0
    lines = []
    for stage, row in enumerate(timeline.spans):
        text = ""
        for span in row:
            start, end = round(span.start * columns), round(span.end * columns)
            text = text.ljust(start, IDLE)
            text += _label(schedule, span.action).ljust(end - start, FILL[span.action.kind])[: end - start]
        lines.append(_row(stage, schedule.num_stages, text.ljust(width, IDLE)))
    margin = " " * lines[0].index("|")
    end_mark = f"{timeline.step_seconds:.4g}"
    return "\n".join([*lines, f"{margin} 0{end_mark.rjust(width - 1)}"])
