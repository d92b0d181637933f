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
from torch.nn.functional import embedding

from ray_ministral.model.low_rank import linear_layers, use_product
from ray_ministral.model.matmul import product
from ray_ministral.model.ministral3 import Ministral3Model

WeightPart = Callable[[], None]


class GradientAccumulator:
    """Gives each trainable parameter of a chunk a `main_grad` (fp32, as Megatron names it) and fills it.

    Between `reset` and `finish` the first gradient of a parameter overwrites what was there and the others are added,
    so that nobody has to write zeros first; `finish` does so for parameters that got none.
    `deferred` None: a backward pass computes everything. A list: the weight parts of linear layers are appended to it
    instead, to be called later in this order.
    """

    def __init__(self, model: Ministral3Model) -> None:
        self.deferred: list[WeightPart] | None = None
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._begun: set[nn.Parameter] = set()
        for parameter in self._parameters:
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.register_post_accumulate_grad_hook(self._take)
        for module in linear_layers(model.language_model):
            use_product(module, self._linear)
        if model.pre_process:
            model.language_model.embedding.word_embeddings.forward = self._embedding(model)

    def reset(self) -> None:
        """Forget all gradients."""
        self._begun.clear()

    def finish(self) -> None:
        """After the last backward pass of a step: every `main_grad` is the step's gradient."""
        for parameter in self._parameters:
            if self.is_first(parameter):
                parameter.main_grad.zero_()

    def is_first(self, parameter: nn.Parameter) -> bool:
        """Whether a gradient that comes now is the parameter's first since `reset`."""
        if parameter in self._begun:
            return False
        self._begun.add(parameter)
        return True

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """A gradient of any dtype goes into the fp32 sum."""
        main_grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]
        if self.is_first(parameter):
            main_grad.copy_(gradient)
        else:
            main_grad.add_(gradient)

    def _take(self, parameter: nn.Parameter) -> None:
        """What autograd has accumulated (of norms and the vision tower) goes into the fp32 sum."""
        if parameter.grad is not None:
            self.add(parameter, parameter.grad)
            parameter.grad = None

    def _linear(self, input: Tensor, weight: nn.Parameter, *_: Any, **__: Any) -> Tensor:  # noqa: A002  # megatron's name
        """Stands for the product of Megatron's linear layers (which here have neither bias nor parallelism)."""
        if weight.requires_grad and torch.is_grad_enabled():
            output: Tensor = _Linear.apply(input, weight, self)  # type: ignore[no-untyped-call]
            return output
        return product(input, weight)

    def _embedding(self, model: Ministral3Model) -> Callable[[Tensor], Tensor]:
        """Stands for Megatron's embedding (which here is not parallel either)."""
        weight: nn.Parameter = model.language_model.embedding.word_embeddings.weight

        def embed(token_ids: Tensor) -> Tensor:
            if weight.requires_grad and torch.is_grad_enabled():
                output: Tensor = _Embedding.apply(token_ids, weight, self)  # type: ignore[no-untyped-call]
                return output
            return embedding(token_ids, weight)

        return embed


class _Linear(torch.autograd.Function):
    """`input @ weight.T`, whose weight gradient goes straight into `weight.main_grad`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: nn.Parameter, accumulator: GradientAccumulator) -> Tensor:  # noqa: A002
        ctx.save_for_backward(input)
        ctx.weight = weight
        ctx.accumulator = accumulator
        return product(input, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (input,) = ctx.saved_tensors  # noqa: A001
        weight: nn.Parameter = ctx.weight
        accumulator: GradientAccumulator = ctx.accumulator
        grad_output = grads[0]
        grad_input = product(grad_output, weight.t()) if ctx.needs_input_grad[0] else None

        @torch.no_grad()  # later it is not called from within a backward pass, and the input may want a gradient
        def weight_part() -> None:
            grad_2d, input_2d = grad_output.flatten(0, -2), input.flatten(0, -2)
            if weight.dtype == torch.float32:
                main_grad: Tensor = weight.main_grad  # type: ignore[attr-defined]
                main_grad.addmm_(grad_2d.t(), input_2d, beta=0 if accumulator.is_first(weight) else 1)
            else:
                accumulator.add(weight, grad_2d.t().matmul(input_2d))

        if accumulator.deferred is None:
            weight_part()
        else:
            accumulator.deferred.append(weight_part)
        return grad_input, None, None


class _Embedding(torch.autograd.Function):
    """Rows of `weight`, whose gradient goes straight into those rows of `weight.main_grad`.

    Autograd's own gradient is as large as the whole embedding, and made anew for each microbatch.
    """

    @staticmethod
    def forward(ctx: Any, token_ids: Tensor, weight: nn.Parameter, accumulator: GradientAccumulator) -> Tensor:
        ctx.save_for_backward(token_ids)
        ctx.weight = weight
        ctx.accumulator = accumulator
        return embedding(token_ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (token_ids,) = ctx.saved_tensors
        main_grad: Tensor = ctx.weight.main_grad
        if ctx.accumulator.is_first(ctx.weight):
            main_grad.zero_()
        rows, gradient = token_ids.flatten(), grads[0].flatten(0, -2).to(main_grad.dtype)
        if main_grad.is_cuda:
            # It sorts, so it adds in one order; index_add_ does not.
            main_grad.index_put_((rows,), gradient, accumulate=True)
        else:
            main_grad.index_add_(0, rows, gradient)
        return None, None, None
