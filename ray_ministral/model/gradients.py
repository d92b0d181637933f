"""Gradients of a chunk, accumulated in fp32 in one order, the weight part of a backward pass now or later.

A zero-bubble schedule splits the backward of a linear layer: the gradient of its input is needed by the stage before at
once, the gradient of its weight by nobody until the optimizer step. Every schedule runs the same products in the same
order for each weight, so that all of them give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ray_ministral.model.low_rank import linear_layers, use_product
from ray_ministral.model.ministral3 import Ministral3Model

WeightPart = Callable[[], None]


class GradientAccumulator:
    """Gives each trainable parameter of a chunk a `main_grad` (fp32, as Megatron names it) and fills it.

    `deferred` None: a backward pass computes everything. A list: the weight parts of linear layers are appended to it
    instead, to be called later in this order.
    """

    def __init__(self, model: Ministral3Model) -> None:
        self.deferred: list[WeightPart] | None = None
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
                parameter.register_post_accumulate_grad_hook(_into_main_grad)
        for module in linear_layers(model.language_model):
            use_product(module, self._linear)

    def _linear(self, input: Tensor, weight: nn.Parameter, *_: Any, **__: Any) -> Tensor:  # noqa: A002  # megatron's name
        """Stands for the product of Megatron's linear layers (which here have neither bias nor parallelism)."""
        if weight.requires_grad and torch.is_grad_enabled():
            output: Tensor = _Linear.apply(input, weight, self)  # type: ignore[no-untyped-call]
            return output
        return linear(input, weight)


def _into_main_grad(parameter: nn.Parameter) -> None:
    """What autograd has accumulated (of norms, embeddings and the vision tower) goes into the fp32 sum."""
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None


class _Linear(torch.autograd.Function):
    """`input @ weight.T`, whose weight gradient goes straight into `weight.main_grad`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: nn.Parameter, accumulator: GradientAccumulator) -> Tensor:  # noqa: A002
        ctx.save_for_backward(input)
        ctx.weight = weight
        ctx.accumulator = accumulator
        return linear(input, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (input,) = ctx.saved_tensors  # noqa: A001
        weight: nn.Parameter = ctx.weight
        grad_output = grads[0]
        grad_input = grad_output.matmul(weight) if ctx.needs_input_grad[0] else None

        @torch.no_grad()  # later it is not called from within a backward pass, and the input may want a gradient
        def weight_part() -> None:
            grad_2d, input_2d = grad_output.flatten(0, -2), input.flatten(0, -2)
            if weight.dtype == torch.float32:
                weight.main_grad.addmm_(grad_2d.t(), input_2d)  # type: ignore[attr-defined]
            else:
                weight.main_grad.add_(grad_2d.t().matmul(input_2d))  # type: ignore[attr-defined]

        deferred = ctx.accumulator.deferred
        if deferred is None:
            weight_part()
        else:
            deferred.append(weight_part)
        return grad_input, None, None
