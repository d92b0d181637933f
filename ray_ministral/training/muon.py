"""`Muon`: a matrix is stepped along its momentum, orthogonalised. Everything else of a model is AdamW's.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the step scaled to AdamW's usual
size as in Liu et al., arXiv 2502.16982: learning rate and decay of the one suit the other. `torch.optim.Muon` with
`adjust_lr_fn="match_rms_adamw"` is the same, in bfloat16, and without the cut of fused parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ray_ministral.model.weights import TensorSlot

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan's quintic iteration: singular values end between about 0.7 and 1.2."""
ADAMW_RMS = 0.2
"""The root mean square of AdamW's usual step, in learning rates."""

BUFFER = "momentum_buffer"
STEP = "step"


class Muon(torch.optim.Optimizer):
    """Steps parameters whose Hugging Face tensors are all matrices, each orthogonalised for itself.

    Query, key and value are one parameter here, and three matrices: so the step does not depend on what is fused. One
    matrix at a time: a batch of several would add in another order, and what shares a stage would change the bits.
    """

    def __init__(self, matrices: Mapping[nn.Parameter, Sequence[TensorSlot]], *, lr: float, weight_decay: float):
        """`matrices`: for each parameter that is stepped the slots that it consists of."""
        self._matrices = dict(matrices)
        super().__init__(list(matrices), {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along `grad`, which is overwritten."""
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update({STEP: torch.tensor(0.0), BUFFER: torch.zeros_like(parameter)})
                state[STEP] += 1
                state[BUFFER].lerp_(parameter.grad, 1 - MOMENTUM)
                ahead = parameter.grad.lerp_(state[BUFFER], MOMENTUM)  # Nesterov's
                parameter.mul_(1 - rate * decay)
                for slot in self._matrices[parameter]:
                    step = orthogonalised(slot.read(ahead))
                    size = ADAMW_RMS * math.sqrt(max(step.shape))
                    slot.region(parameter).sub_(slot.blocks(step), alpha=rate * size)


def orthogonalised(matrix_RC: Tensor) -> Tensor:
    """About the nearest matrix whose singular values are all 1; the same shape. Of zeros: zeros."""
    a, b, c = COEFFICIENTS
    wide: Tensor = matrix_RC if matrix_RC.shape[0] <= matrix_RC.shape[1] else matrix_RC.mT
    x: Tensor = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix_RC else x.mT
