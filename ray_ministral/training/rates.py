"""The two factors of an optimizer step, as pure functions: how gradients are clipped, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ray_ministral.config import LearningRateName
from ray_ministral.errors import ConfigError, DivergedError


def global_norm(squared_norms: Mapping[str, float]) -> float:
    """The norm of all gradients from the squared norm of each, added in the order of their names on every layout."""
    return math.sqrt(sum(squared_norms[name] for name in sorted(squared_norms)))


def clip_scale(norm: float, clip_norm: float | None) -> float:
    """The factor that brings a gradient of this norm down to `clip_norm`; as in `torch.nn.utils.clip_grad_norm_`.

    Raises DivergedError where the norm is no number: a step along such a gradient would leave no weight as it was.
    """
    if not math.isfinite(norm):
        raise DivergedError(
            f"the norm of the step's gradients is {norm}; the step was not taken, and the checkpoints are from before: "
            "go on with a lower --learning-rate, more --warmup-steps or a smaller --clip-norm"
        )
    return 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))


@dataclass(frozen=True)
class LearningRate:
    """Linear warmup, then constant, or down to zero at `total_steps` along a cosine or a line."""

    peak: float
    warmup_steps: int = 0
    total_steps: int | None = None
    schedule: LearningRateName = "constant"

    def __post_init__(self) -> None:
        if self.schedule != "constant" and self.total_steps is None:
            raise ConfigError(f"--lr-schedule {self.schedule} needs an end: give --steps or --epochs")

    def at(self, step: int) -> float:
        """For the optimizer step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.schedule == "constant" or self.total_steps is None:
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, done)
        return self.peak * (0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done)
