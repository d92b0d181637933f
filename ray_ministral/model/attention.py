"""Core attention over a packed token stream: the one place where RoPE, the query scale, the cache and the kernel meet.

`PackedAttention` is what the Megatron layer spec puts into each layer. It rotates, then leaves the rest to the
`AttentionContext` of the batch: `CausalAttention` here (training, plain forward), the KV cache when captioning.
Legend: T tokens, N sequences, L their length, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ray_ministral.model.megatron_core import MegatronModule, PackedSeqParams
from ray_ministral.model.rope import RotaryTables


class AttentionContext(Protocol):
    """How the tokens of a batch see one another, and what went before."""

    def attend(self, layer: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor) -> Tensor:
        """Attention output `[T, H, D]` of the chunk's layer number `layer` (from 0); all inputs are rotated."""
        ...


@dataclass
class PackedAttentionParams(PackedSeqParams):  # type: ignore[misc]  # megatron ships no types
    """Carries the batch's rotary tables and attention context through Megatron's layers to `PackedAttention`."""

    qkv_format: str = "thd"
    rotary: RotaryTables | None = None
    context: AttentionContext = field(default_factory=lambda: CausalAttention(()))


class PackedAttention(MegatronModule):  # type: ignore[misc]  # megatron ships no types
    """The `core_attention` of the layer spec. Has no parameters."""

    def __init__(self, config: Any, layer_number: int, **_unused_by_packed_attention: Any) -> None:
        super().__init__(config=config)
        self.layer = layer_number - 1

    def forward(
        self,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        _attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedAttentionParams | None = None,
        **_unused_by_packed_attention: Any,
    ) -> Tensor:
        """Rotate, attend; returns `[T, H * D]`."""
        assert packed_seq_params is not None, "the chunk always packs"
        rotary = packed_seq_params.rotary
        assert rotary is not None, "the chunk always makes rotary tables"
        out_THD = packed_seq_params.context.attend(
            self.layer, rotary.scale_query(rotary.rotate(query_THD)), rotary.rotate(key_TGD), value_TGD
        )
        return out_THD.flatten(1)


@dataclass(frozen=True)
class CausalAttention:
    """Each sequence sees itself, causally, and nothing else. `lengths` as in `PackedBatch`."""

    lengths: Sequence[int]

    def attend(self, layer: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor) -> Tensor:  # noqa: ARG002
        """See `AttentionContext`; without a cache all layers are alike."""
        outputs = [
            attention_of_equals(query_THD[rows], key_TGD[rows], value_TGD[rows], count, is_causal=True)
            for rows, count in equal_length_runs(self.lengths)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def equal_length_runs(lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Neighbouring sequences of one length, as (rows of the stream, how many sequences): one kernel call each."""
    start = 0
    for length, group in groupby(lengths):
        count = sum(1 for _ in group)
        yield slice(start, start + length * count), count
        start += length * count


def attention_of_equals(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, count: int, *, is_causal: bool
) -> Tensor:
    """Attention within each of `count` sequences of equal length that make up the stream; `[T, H, D]`."""

    def split(x: Tensor) -> Tensor:
        return x.view(count, -1, *x.shape[1:]).transpose(1, 2)

    out_NHLD: Tensor = scaled_dot_product_attention(
        split(query_THD), split(key_TGD), split(value_TGD), is_causal=is_causal, enable_gqa=True
    )
    return out_NHLD.transpose(1, 2).flatten(0, 1)


def attend_to_prefix(query_LHD: Tensor, key_GPD: Tensor, value_GPD: Tensor) -> Tensor:
    """The last L tokens of one sequence see all its P tokens so far (themselves included, causally); `[L, H, D]`."""
    length, prefix = query_LHD.shape[0], key_GPD.shape[1]
    mask_LP = torch.ones(length, prefix, dtype=torch.bool, device=query_LHD.device).tril(prefix - length)
    out_1HLD: Tensor = scaled_dot_product_attention(
        query_LHD.transpose(0, 1).unsqueeze(0),
        key_GPD.unsqueeze(0),
        value_GPD.unsqueeze(0),
        attn_mask=mask_LP,
        enable_gqa=True,
    )
    return out_1HLD.squeeze(0).transpose(0, 1)


def decode_attention(query_NHD: Tensor, key_NGPD: Tensor, value_NGPD: Tensor, mask_NP: Tensor | None) -> Tensor:
    """One new token of each of N sequences sees its cached tokens; `[N, H, D]`.

    The query heads that share a KV head stand in the place of query positions, so keys and values are read once and
    never repeated. `mask_NP` is true where a sequence has a token; None where all are equally long.
    """
    groups = key_NGPD.shape[1]
    out: Tensor = scaled_dot_product_attention(
        query_NHD.unflatten(1, (groups, -1)),
        key_NGPD,
        value_NGPD,
        attn_mask=None if mask_NP is None else mask_NP[:, None, None, :],
    )
    return out.flatten(1, 2)
