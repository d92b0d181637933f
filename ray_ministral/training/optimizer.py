"""The optimizer of a stage over fp32 masters, keyed by global names: AdamW, or Muon for matrices and AdamW besides.

AdamW: Loshchilov and Hutter, arXiv 1711.05101, as in `torch.optim.AdamW`, which does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ray_ministral.config import OptimizerConfig
from ray_ministral.model.checkpoint import EMBEDDING, OUTPUT_LAYER
from ray_ministral.model.ministral3 import Ministral3Model
from ray_ministral.model.weights import TensorSlot, parameter_slots
from ray_ministral.training.muon import BUFFER, Muon

MASTER = "master"
"""In a checkpoint: the fp32 value of a parameter that is held in fewer bits."""


class Optimizer:
    """Steps the masters of some parameters; under bf16 the parameters are rounded copies of them.

    No decay on norms and biases, which are the parameters of one dimension. Muon steps what multiplies hidden states:
    every matrix but the embedding and the output layer.
    """

    def __init__(self, chunks: Sequence[Ministral3Model], options: OptimizerConfig) -> None:
        """Of the chunks' parameters those that want a gradient, in `parameters`."""
        self.parameters: dict[str, nn.Parameter] = {}
        self.masters: dict[str, nn.Parameter] = {}
        matrices: dict[nn.Parameter, list[TensorSlot]] = {}
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for chunk in chunks:
            for parameter, slots in parameter_slots(chunk).items():
                if not parameter.requires_grad:
                    continue
                name = next(iter(slots))
                in_fp32 = parameter.dtype == torch.float32
                master = parameter if in_fp32 else nn.Parameter(parameter.detach().float())
                self.parameters[name], self.masters[name] = parameter, master
                if options.name == "muon" and parameter.ndim == 2 and name not in (EMBEDDING, OUTPUT_LAYER):
                    matrices[master] = list(slots.values())
                else:
                    (decayed if parameter.ndim > 1 else others).append(master)
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
        # Both groups may be empty: a stage of decoder layers has nothing to train under `--freeze language`.
        adamw = torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
            fused=True,  # one pass over each tensor
        )
        self._optimizers: list[torch.optim.Optimizer] = [adamw]
        if matrices:
            self._optimizers.append(Muon(matrices, lr=0.0, weight_decay=options.weight_decay))
        self._matrices = frozenset(matrices)

    def step(self, scale: float, learning_rate: float) -> None:
        """One step along `main_grad * scale`."""
        for name, master in self.masters.items():
            gradient = self.parameters[name].main_grad  # type: ignore[attr-defined]
            master.grad = gradient.mul_(scale) if scale != 1 else gradient
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                master.grad = None
                if master is not self.parameters[name]:
                    self.parameters[name].copy_(master)

    def moments(self, name: str) -> tuple[str, ...]:
        """What `state` holds of a parameter after its first step besides the number `step`: fp32, shaped as it is."""
        return (BUFFER,) if self.masters[name] in self._matrices else ("exp_avg", "exp_avg_sq")

    def state(self, name: str) -> dict[str, Tensor]:
        """What goes into a checkpoint besides the parameter; live tensors, fp32, shaped as the parameter.

        `master` where it is not the parameter itself; after the first step the `moments` and the number `step`.
        """
        master = self.masters[name]
        kept = {} if master is self.parameters[name] else {MASTER: master.detach()}
        return kept | dict(self._of(master).state.get(master, {}))

    def load_state(self, name: str, master: Tensor, moments: Mapping[str, Tensor]) -> None:
        """Set the parameter from its master (any dtype), and the moments and `step`, which are kept, not copied.

        No moments: the parameter was never stepped.
        """
        held = self.masters[name]
        with torch.no_grad():
            held.copy_(master)
            if held is not self.parameters[name]:
                self.parameters[name].copy_(held)
        self._of(held).state.pop(held, None)
        if moments:
            self._of(held).state[held] = dict(moments)

    def adopt(self, other: Optimizer) -> None:
        """Take over masters and moments of the parameters that another one has, too, by reference."""
        for name in self.parameters.keys() & other.parameters.keys():
            mine, theirs = self.masters[name], other.masters[name]
            mine.data = theirs.data
            held = other._of(theirs).state.get(theirs)
            if held:
                self._of(mine).state[mine] = dict(held)

    def _of(self, master: nn.Parameter) -> torch.optim.Optimizer:
        return self._optimizers[1 if master in self._matrices else 0]
