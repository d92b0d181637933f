"""`loss.png`: the loss of each step, a smoothed line through it, and the losses of the evaluations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

Point = tuple[int, float]
"""(step, loss)."""

SPAN = 20
"""Steps that the smoothed line mostly looks back on."""


def smooth(losses: Sequence[float], span: int = SPAN) -> list[float]:
    """The exponentially weighted mean of the losses so far; weights fall by 1 - 2 / (span + 1) a step."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    smoothed = []
    for loss in losses:
        total, weight = keep * total + loss, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def draw_losses(path: Path, steps: Sequence[Point], evaluations: Sequence[Point]) -> None:
    """Write the picture; one that is there stays until the new one is whole."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    if steps:
        numbers, losses = zip(*steps, strict=True)
        axes.plot(numbers, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
        axes.plot(numbers, smooth(losses), color="tab:blue", linewidth=1.8, label=f"smoothed over {SPAN} steps")
    if evaluations:
        numbers, losses = zip(*evaluations, strict=True)
        axes.plot(numbers, losses, color="tab:orange", marker="o", linewidth=1, label="evaluation")
    axes.grid(visible=True, alpha=0.3)
    if steps or evaluations:
        axes.legend()
    temporary = path.with_name(f"_tmp.{path.name}")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
