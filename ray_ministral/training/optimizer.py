"""AdamW over fp32 masters, keyed by global names, and the numbers that go with it: clipping and the learning rate.

Formulas: Loshchilov and Hutter, arXiv 1711.05101, as in `torch.optim.AdamW`, which does the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ray_ministral.config import LearningRateName, OptimizerConfig
from ray_ministral.errors import ConfigError

MASTER = "master"
"""In a checkpoint: the fp32 value of a parameter that is held in fewer bits."""


class AdamW:
    """Steps the masters of some parameters; under bf16 the parameters are rounded copies of them.

    No decay on norms and biases, which are the parameters of one dimension.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], options: OptimizerConfig) -> None:
        self._parameters = dict(parameters)
        self.masters = {
            name: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in self._parameters.items()
        }
        decayed = [master for master in self.masters.values() if master.ndim > 1]
        others = [master for master in self.masters.values() if master.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
            foreach=False,
        )

    def step(self, scale: float, learning_rate: float) -> None:
        """One step along `main_grad * scale`."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for name, master in self.masters.items():
            gradient = self._parameters[name].main_grad  # type: ignore[attr-defined]
            master.grad = gradient.mul_(scale) if scale != 1 else gradient
        self._optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                master.grad = None
                if master is not self._parameters[name]:
                    self._parameters[name].copy_(master)

    def state(self, name: str) -> dict[str, Tensor]:
        """What goes into a checkpoint besides the parameter; live tensors, fp32, shaped as the parameter.

        `master` where it is not the parameter itself; after the first step `exp_avg`, `exp_avg_sq` and the number
        `step`.
        """
        master = self.masters[name]
        kept = {} if master is self._parameters[name] else {MASTER: master.detach()}
        return kept | dict(self._optimizer.state.get(master, {}))

    def load_state(self, name: str, master: Tensor, moments: Mapping[str, Tensor]) -> None:
        """Set the parameter from its master (any dtype), and the moments and `step`, which are kept, not copied.

        No moments: the parameter was never stepped.
        """
        with torch.no_grad():
            self.masters[name].copy_(master)
            if self.masters[name] is not self._parameters[name]:
                self._parameters[name].copy_(self.masters[name])
        self._optimizer.state.pop(self.masters[name], None)
        if moments:
            self._optimizer.state[self.masters[name]] = dict(moments)


def global_norm(squared_norms: Mapping[str, float]) -> float:
    """The norm of all gradients from the squared norm of each, added in the order of their names on every layout."""
    return math.sqrt(sum(squared_norms[name] for name in sorted(squared_norms)))


def clip_scale(norm: float, clip_norm: float | None) -> float:
    """The factor that brings a gradient of this norm down to `clip_norm`, as `torch.nn.utils.clip_grad_norm_` has it."""
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
