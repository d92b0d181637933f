"""Rotary embeddings (YaRN) and the Llama-4 query scale, by the true position of every token.

Formulas: transformers `modeling_rope_utils` (YaRN, arXiv 2309.00071) and `ministral3.get_llama_4_attn_scale`. They are
computed once per step and chunk and shared by its layers. Legend: T tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Mistral3Config


@dataclass(frozen=True)
class RotaryTables:
    """`cos_TD`, `sin_TD` and the query scale `scale_T` (None where it is one everywhere), in the model's dtype."""

    cos_TD: Tensor
    sin_TD: Tensor
    scale_T: Tensor | None = None

    @cached_property
    def signed_sin_TD(self) -> Tensor:
        """`sin_TD` with the signs that a rotation gives to the other half of a head."""
        first, second = self.sin_TD.chunk(2, -1)
        return torch.cat((-first, second), -1)

    @cached_property
    def back_sin_TD(self) -> Tensor:
        """`signed_sin_TD` of the transposed rotation."""
        return torch.cat(self.signed_sin_TD.chunk(2, -1)[::-1], -1)

    def rotate(self, x_TND: Tensor) -> Tensor:
        """Rotate queries or keys of any number of heads N."""
        if torch.is_grad_enabled() and x_TND.requires_grad:
            rotated: Tensor = _Rotate.apply(  # type: ignore[no-untyped-call]
                x_TND, self.cos_TD, self.signed_sin_TD, self.back_sin_TD
            )
            return rotated
        return _rotate(x_TND, self.cos_TD, self.signed_sin_TD)

    def scale_query(self, q_TND: Tensor) -> Tensor:
        """Scale queries by their position."""
        return q_TND if self.scale_T is None else q_TND * self.scale_T.view(-1, 1, 1)


def _rotate(x_TND: Tensor, cos_TD: Tensor, signed_sin_TD: Tensor) -> Tensor:
    first, second = x_TND.chunk(2, -1)
    return torch.addcmul(x_TND * cos_TD.unsqueeze(1), torch.cat((second, first), -1), signed_sin_TD.unsqueeze(1))


class _Rotate(torch.autograd.Function):
    """The transpose of a rotation is the rotation back; autograd's own backward has many times as many products."""

    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, cos_TD: Tensor, signed_sin_TD: Tensor, back_sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, back_sin_TD)
        return _rotate(x_TND, cos_TD, signed_sin_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos_TD, back_sin_TD = ctx.saved_tensors
        return _rotate(grads[0], cos_TD, back_sin_TD), None, None, None


class Rotary:
    """Makes `RotaryTables` for given positions. Frequencies stay in fp32 whatever the model's dtype."""

    def __init__(self, config: Mistral3Config) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        from transformers.models.ministral3.modeling_ministral3 import Ministral3RotaryEmbedding

        text: Any = config.text_config
        rope = text.rope_parameters
        init: Any = ROPE_INIT_FUNCTIONS.get(
            rope["rope_type"], Ministral3RotaryEmbedding.compute_default_rope_parameters
        )
        self.inv_freq, self.attention_scaling = init(text)
        self.beta: float = rope.get("llama_4_scaling_beta") or 0.0
        self.original_max_positions: int = rope.get("original_max_position_embeddings") or 1

    def tables(self, positions_T: Tensor, dtype: torch.dtype) -> RotaryTables:
        """Tables for int64 `positions_T`, on their device."""
        if self.inv_freq.device != positions_T.device:
            self.inv_freq = self.inv_freq.to(positions_T.device)
        half_TD = positions_T[:, None].float() * self.inv_freq
        angles_TD = torch.cat((half_TD, half_TD), dim=-1)
        scale_T = None
        if self.beta:
            scale_T = 1 + self.beta * torch.log(1 + torch.floor(positions_T / self.original_max_positions))
            scale_T = scale_T.to(dtype)
        return RotaryTables(
            cos_TD=(angles_TD.cos() * self.attention_scaling).to(dtype),
            sin_TD=(angles_TD.sin() * self.attention_scaling).to(dtype),
            scale_T=scale_T,
        )
