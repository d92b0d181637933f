"""Keys and values of one microbatch on one stage, and attention over them.

A sequence has a slot, a row of one tensor per layer; sequences that decode have the first slots, so that decoding reads
the cache as it lies, without gathering. Legend: S slots, C their capacity in tokens, G KV heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_ministral.captioning.plan import StepPlan
from ray_ministral.model.attention import attend_to_prefix, causal_attention, decode_attention, equal_length_runs

CAPACITY_STEP = 64
SLOTS_STEP = 8
"""Capacity and slots grow in steps, since growing copies, as far as the token budget allows."""


class KVCache:
    """The cache of one microbatch: one tensor `[2, S, G, C, D]` (keys, values) for each layer of the chunk.

    S times C stays within `token_budget`, unless one plan needs more by itself.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        token_budget: int,
    ) -> None:
        self._budget = token_budget
        empty = torch.empty(2, 0, num_kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.layers: list[Tensor] = [empty] * num_layers

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.nbytes for layer in self.layers)

    def prepare(self, plan: StepPlan) -> None:
        """Make room for the plan's slots and carry out its moves."""
        if plan.moves:
            sources, targets = (list(ends) for ends in zip(*plan.moves, strict=True))
            for layer in self.layers:
                layer[:, targets] = layer[:, sources]
        _, slots, heads, capacity, dim = self.layers[0].shape
        if plan.num_slots <= slots and plan.capacity <= capacity:
            return
        slots, capacity = self._grown(slots, capacity, plan)
        for index, layer in enumerate(self.layers):
            # Zeros, since a masked-out position still enters the products with weight 0: it must be finite.
            grown = layer.new_zeros(2, slots, heads, capacity, dim)
            # Not the decoding ones alone: a prompt may be half in.
            kept = layer[:, : plan.num_slots, :, :capacity]
            grown[:, : kept.shape[1], :, : kept.shape[3]] = kept
            self.layers[index] = grown

    def _grown(self, slots: int, capacity: int, plan: StepPlan) -> tuple[int, int]:
        """The most generous of some sizes that the budget allows; at least what the plan needs."""
        rounded_slots = -(-plan.num_slots // SLOTS_STEP) * SLOTS_STEP
        rounded_capacity = -(-plan.capacity // CAPACITY_STEP) * CAPACITY_STEP
        candidates = (
            (max(slots, rounded_slots), max(capacity, rounded_capacity)),
            (rounded_slots, rounded_capacity),
            (plan.num_slots, rounded_capacity),
        )
        fitting = ((s, c) for s, c in candidates if s * c <= self._budget)
        return next(fitting, (plan.num_slots, plan.capacity))


class CachedAttention:
    """The `AttentionContext` of one step: new tokens go into the cache and see what is there."""

    def __init__(self, cache: KVCache, plan: StepPlan, device: torch.device) -> None:
        self.cache = cache
        self.plan = plan
        self.positions_N = torch.from_numpy(plan.decode_positions).to(device, torch.int64)
        self.slots_N = torch.arange(plan.num_decode, device=device)
        self.longest = int(plan.decode_positions.max()) + 1 if plan.num_decode else 0
        even = plan.num_decode == 0 or int(plan.decode_positions.min()) + 1 == self.longest
        self.mask_NP = None if even else torch.arange(self.longest, device=device) <= self.positions_N[:, None]

    def attend(self, layer: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor) -> Tensor:
        """See `model.attention.AttentionContext`."""
        keys_SGCD, values_SGCD = self.cache.layers[layer].unbind(0)
        outputs = []
        decoding = self.plan.num_decode
        if decoding:
            keys_SGCD[self.slots_N, :, self.positions_N] = key_TGD[:decoding]
            values_SGCD[self.slots_N, :, self.positions_N] = value_TGD[:decoding]
            outputs.append(
                decode_attention(
                    query_THD[:decoding],
                    keys_SGCD[:decoding, :, : self.longest],
                    values_SGCD[:decoding, :, : self.longest],
                    self.mask_NP,
                )
            )
        start = decoding
        for piece in self.plan.prefills:
            rows = slice(start, start + piece.length)
            upto = piece.start + piece.length
            keys_SGCD[piece.slot, :, piece.start : upto] = key_TGD[rows].transpose(0, 1)
            values_SGCD[piece.slot, :, piece.start : upto] = value_TGD[rows].transpose(0, 1)
            start = rows.stop
        outputs += self._attend_prefills(query_THD, key_TGD, value_TGD, keys_SGCD, values_SGCD)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_prefills(
        self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, keys_SGCD: Tensor, values_SGCD: Tensor
    ) -> list[Tensor]:
        pieces = self.plan.prefills
        base = self.plan.num_decode
        if all(piece.start == 0 for piece in pieces):
            return [
                causal_attention(
                    query_THD[base + rows.start : base + rows.stop],
                    key_TGD[base + rows.start : base + rows.stop],
                    value_TGD[base + rows.start : base + rows.stop],
                    count,
                )
                for rows, count in equal_length_runs([piece.length for piece in pieces])
            ]
        outputs = []
        for piece in pieces:
            upto = piece.start + piece.length
            outputs.append(
                attend_to_prefix(
                    query_THD[base : base + piece.length],
                    keys_SGCD[piece.slot, :, :upto],
                    values_SGCD[piece.slot, :, :upto],
                )
            )
            base += piece.length
        return outputs
