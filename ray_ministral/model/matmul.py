"""Matrix products on CPU: oneDNN's kernels, with a weight laid out once for them where it stays as it is.

torch multiplies fp32 on CPU with MKL, which on some processors is slower than oneDNN: by a sixth, and by a third where
there are few tokens and oneDNN reads a laid-out weight as it streams from memory. Both come with torch.
Legend: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

TYPICAL_TOKENS = 64
"""What a weight is laid out for; the layout serves any number of tokens."""

ENOUGH_TOKENS = 128
"""From here on it pays to lay a weight out for a single product."""


def onednn_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies here: on CPU, in a build of torch that has its operators."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


class PackedWeight:
    """`[N, K]` (and a bias `[N]`) laid out for oneDNN; called, it gives `x @ weight.T + bias`. It has no gradient.

    A copy: the weight that it was made of may be given back, see `give_back`.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
        with torch.no_grad():
            plain = weight_NK.detach().contiguous()
            self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(plain, TYPICAL_TOKENS)
        self._bias = None if bias_N is None else bias_N.detach().clone()

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return output


def take_over(module: Any) -> PackedWeight:
    """Pack the weight of a linear layer, which loses it."""
    packed = PackedWeight(module.weight, getattr(module, "bias", None))
    give_back(module)
    return packed


def give_back(*modules: Any) -> None:
    """Drop the `weight` of modules whose weights are packed, and let the system have the memory.

    Stages tell malloc to keep what is freed, and a packed weight does not fit into the hole that its original leaves:
    without this a stage that packs its weights ends up with half as much again.
    """
    for module in modules:
        module.weight = None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def product(x: Tensor, weight_NK: Tensor) -> Tensor:
    """`x @ weight.T` of a weight that may change before the next call; `[..., K]` to `[..., N]`, without gradients."""
    if (
        x.dtype == torch.float32  # for bf16 torch calls oneDNN by itself
        and x.numel() >= ENOUGH_TOKENS * x.shape[-1]
        and onednn_serves(x.device, x.dtype)
    ):
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_NK, None, "none", [], "")
        return output
    return linear(x, weight_NK)
