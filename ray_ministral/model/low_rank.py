"""Low-rank adapters (LoRA, arXiv 2106.09685) on a chunk's linear layers: a pair A, B for each Hugging Face projection.

`x W^T` becomes `x W^T + scale (x A^T) B^T`. Megatron computes query, key and value of each group in one product, and
gate with up; here their A are one parameter, too (one product instead of three), and what their B give is put together
in the order of the fused product's columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Product = Callable[..., Tensor]
"""`product(input, weight)`: `input @ weight.T`, and what gradients need besides; takes Megatron's other arguments."""

_CHILD = "low_rank"


class LowRank(nn.Module):
    """The adapters of one of Megatron's linear layers.

    names: of its projections, in the order of the fused output. rows: how many outputs each has. groups: in how many
    blocks the output repeats that order. `a` `[len(names) * rank, in]` and `b`, `[rows, rank]` for each projection, are
    zeros at first.
    """

    def __init__(
        self, names: Sequence[str], rows: Sequence[int], groups: int, rank: int, scale: float, like: nn.Parameter
    ) -> None:
        super().__init__()
        self.names, self.rank, self.scale = tuple(names), rank, scale
        self._groups = groups
        options: Any = {"dtype": like.dtype, "device": like.device}
        self.a = nn.Parameter(torch.zeros(len(names) * rank, like.shape[1], **options))
        self.b = nn.ParameterList([nn.Parameter(torch.zeros(count, rank, **options)) for count in rows])

    def forward(self, product: Product, input: Tensor, weight: nn.Parameter, *_: Any, **__: Any) -> Tensor:  # noqa: A002
        """Stands for Megatron's product."""
        low = (product(input, self.a) * self.scale).chunk(len(self.names), -1)
        parts = [product(part, b).unflatten(-1, (self._groups, -1)) for part, b in zip(low, self.b, strict=True)]
        return product(input, weight) + torch.cat(parts, -1).flatten(-2)


def linear_layers(model: nn.Module) -> Iterator[Any]:
    """Megatron's linear layers below a module."""
    return (module for module in model.modules() if hasattr(module, "_forward_impl"))


def use_product(module: Any, product: Product) -> None:
    """Let one of Megatron's linear layers, and its adapters if it has some, multiply with `product`."""
    adapters = getattr(module, _CHILD, None)
    module._forward_impl = product if adapters is None else partial(adapters, product)


def multiply(module: Any, given: Tensor, weight: nn.Parameter | None = None) -> Tensor:
    """What one of Megatron's linear layers gives, with its adapters; with another's `weight` where it has none."""
    output: Tensor = module._forward_impl(given, module.weight if weight is None else weight)
    return output


def adapt(module: Any, adapters: LowRank) -> None:
    """Give one of Megatron's linear layers its adapters."""
    module.add_module(_CHILD, adapters)
    use_product(module, plain_product)


def plain_product(input: Tensor, weight: nn.Parameter, *_: Any, **__: Any) -> Tensor:  # noqa: A002  # megatron's name
    """`input @ weight.T`; the layers here have neither bias nor parallelism."""
    return nn.functional.linear(input, weight)


def adapters_of(model: nn.Module) -> Iterator[LowRank]:
    """The adapters of a chunk, in its order."""
    return (module for module in model.modules() if isinstance(module, LowRank))


def adapter_names(projection: str) -> tuple[str, str]:
    """How `peft` names a projection's A and B in a file; `projection` as in `Mistral3ForConditionalGeneration`."""
    return f"base_model.model.{projection}.lora_A.weight", f"base_model.model.{projection}.lora_B.weight"
