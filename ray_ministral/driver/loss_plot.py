"""`loss.png`: the loss of each step, a smoothed line through it, and the losses of the evaluations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

Point = tuple[int, float]
"""(step, loss)."""

HALF_WINDOW = 10
"""Steps on either side that a point of the smoothed line is the mean of, in runs that are long enough."""


def smooth(losses: Sequence[float], half_window: int) -> list[float]:
    """The mean of each loss and its neighbours, as many on the one side as on the other."""
    sums = [0.0, *accumulate(losses)]
    count = len(losses)
    smoothed = []
    for index in range(count):
        reach = min(half_window, index, count - 1 - index)
        smoothed.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
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
        smoothed = smooth(losses, min(HALF_WINDOW, len(losses) // 20))
        axes.plot(numbers, smoothed, color="tab:blue", linewidth=1.8, label="smoothed")
    if evaluations:
        numbers, losses = zip(*evaluations, strict=True)
        axes.plot(numbers, losses, color="tab:orange", marker="o", linewidth=1, label="evaluation")
    axes.grid(visible=True, alpha=0.3)
    if steps or evaluations:
        axes.legend()
    temporary = path.with_name(f"_tmp.{path.name}")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
