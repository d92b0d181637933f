"""A packed token stream: many sequences end to end, each token with its own position, no padding.

Legend of shapes: T tokens of the batch, B padded sequences, S their padded length, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ray_ministral.model.attention import AttentionContext


@dataclass(frozen=True)
class PackedBatch:
    """What one forward pass of a chunk works on.

    positions_T: int64, the true position of each token in its sequence.
    lengths: how many of the T tokens belong to each sequence, in order; each at least 1.
    token_ids_T: int64; a first chunk needs it unless it is given `inputs_embeds`.
    images: for a first chunk, the images in the order of their placeholders, float `[3, height, width]`, normalised.
    prompt_start: the row of the stream where prompts begin; an image token before it was generated, and has no image.
    logit_rows: int64 rows of the stream for which the last chunk computes logits; None means all.
    attention: how tokens see one another and a cache; None means causal within each sequence, from its first token.
    """

    positions_T: Tensor
    lengths: tuple[int, ...]
    token_ids_T: Tensor | None = None
    images: Sequence[Tensor] = ()
    prompt_start: int = 0
    logit_rows: Tensor | None = None
    attention: AttentionContext | None = None

    def __post_init__(self) -> None:
        tokens = self.positions_T.numel()
        if sum(self.lengths) != tokens or min(self.lengths, default=0) < 1:
            raise ValueError(f"lengths {self.lengths} must be positive and add up to the {tokens} tokens of the batch")
        if self.token_ids_T is not None and self.token_ids_T.shape != self.positions_T.shape:
            raise ValueError(
                f"token_ids {tuple(self.token_ids_T.shape)} and positions {tuple(self.positions_T.shape)} differ in "
                "shape: give one of each for every token"
            )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.positions_T.numel()


@dataclass(frozen=True)
class Padding:
    """How padded `[B, S]` tensors map to a packed stream and back: `mask_BS`, true where there is a token."""

    mask_BS: Tensor

    @classmethod
    def of(cls, shape: tuple[int, int], attention_mask_BS: Tensor | None, device: torch.device) -> Padding:
        """From Hugging Face's attention mask (1 is a token, 0 is padding), on either side; None means no padding."""
        if attention_mask_BS is None:
            return cls(torch.ones(shape, dtype=torch.bool, device=device))
        if tuple(attention_mask_BS.shape) != shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask_BS.shape)}, wanted the shape of the batch, {shape}: "
                "a mask of 0 and 1 for each token"
            )
        mask = attention_mask_BS.to(device=device, dtype=torch.bool)
        steps = mask.int().diff(dim=1)
        if bool(((steps == 1).sum(1) + mask[:, 0].int() > 1).any()):
            raise ValueError("attention_mask has holes: padding must stand before or after a sequence, not inside it")
        return cls(mask)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence that has any."""
        return tuple(n for n in self.mask_BS.sum(1).tolist() if n)

    def pack(self, values_BS: Tensor) -> Tensor:
        """`[B, S, ...]` to `[T, ...]`."""
        return values_BS[self.mask_BS]

    def unpack(self, values_T: Tensor) -> Tensor:
        """`[T, ...]` to `[B, S, ...]`, zero at the padding."""
        full = values_T.new_zeros((*self.mask_BS.shape, *values_T.shape[1:]))
        full[self.mask_BS] = values_T
        return full
