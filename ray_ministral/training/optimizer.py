"""AdamW over fp32 masters, keyed by global names, and the numbers that go with it: clipping and the learning rate.

Formulas: Loshchilov and Hutter, arXiv 1711.05101, as in `torch.optim.AdamW`, which does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ray_ministral.config import OptimizerConfig

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
        # Both groups may be empty: a stage of decoder layers has nothing to train under `--freeze language`.
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
            fused=True,  # one pass over each tensor
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
