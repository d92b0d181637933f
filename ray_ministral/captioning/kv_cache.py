"""Keys and values of one microbatch on one stage, and attention over them.

A sequence has a row of a bank: all rows of a bank hold the same number of tokens, and a sequence that outgrows its bank
moves to the next one. So memory follows what sequences hold, to a block of tokens each; sequences that decode have
the first rows of a bank, so that decoding reads the cache as it lies, without gathering, and a short sequence does not
wait for a long one. Legend: S rows, C their capacity in tokens, G KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_ministral.captioning.plan import StepPlan, in_blocks
from ray_ministral.model.attention import attend_to_prefix, attention_of_equals, decode_attention, equal_length_runs

GROWTH = 4
"""A bank that grows takes a quarter more rows than it needs, where the budget allows; growing copies it."""

SPARE_ROWS = 8
"""A bank gives rows back when it has so many more than twice those in use."""


@dataclass(eq=False)
class Bank:
    """Rows of one capacity: for each layer a tensor `[2, S, G, C, D]` (keys, values).

    slots: the sequence in each row that is in use, decoding ones first. num_decode: how many those are.
    """

    layers: list[Tensor]
    slots: list[int] = field(default_factory=list)
    num_decode: int = 0

    @property
    def rows(self) -> int:
        """S."""
        return self.layers[0].shape[1]

    def resize(self, rows: int) -> None:
        """Set S; the rows in use before stay. New ones are zero: what is masked out must still be finite."""
        for index, layer in enumerate(self.layers):
            two, held, *rest = layer.shape
            resized = layer.new_zeros(two, rows, *rest)
            resized[:, : min(held, rows)] = layer[:, :rows]
            self.layers[index] = resized


class KVCache:
    """The cache of one microbatch, for the layers of a chunk. Rows times capacity of all banks are at most
    `token_budget`, unless the sequences need more by themselves."""

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
        self._num_layers, self._shape = num_layers, (num_kv_heads, head_dim)
        self._like = torch.empty(0, dtype=dtype, device=device)
        self.banks: dict[int, Bank] = {}
        self._places: dict[int, tuple[int, int]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.nbytes for bank in self.banks.values() for layer in bank.layers)

    @property
    def tokens(self) -> int:
        """Tokens that there is room for."""
        return sum(capacity * bank.rows for capacity, bank in self.banks.items())

    def place(self, slot: int) -> tuple[int, int]:
        """Capacity of the bank, and the row, of a sequence that is in the last plan."""
        return self._places[slot]

    def row(self, layer: int, slot: int) -> Tensor:
        """Keys and values `[2, G, C, D]` of a sequence, a view."""
        capacity, row = self._places[slot]
        return self.banks[capacity].layers[layer][:, row]

    def prepare(self, plan: StepPlan) -> None:
        """Carry out the plan's moves, forget sequences that have ended, and make room for what the plan adds."""
        held = dict(self._places)
        for source, target in plan.moves:
            held[target] = held.pop(source)
        wanted: dict[int, tuple[list[int], list[int]]] = {}  # by capacity: decoding slots, and the others
        for slot, position in enumerate(plan.decode_positions.tolist()):
            capacity = max(in_blocks(position + 1), held[slot][0])
            wanted.setdefault(capacity, ([], []))[0].append(slot)
        for piece in plan.prefills:
            if piece.start == 0:
                held.pop(piece.slot, None)  # of a sequence that has ended
            before = held[piece.slot][0] if piece.start else 0
            capacity = max(in_blocks(piece.start + piece.length), before)
            wanted.setdefault(capacity, ([], []))[1].append(piece.slot)
        self._arrange(held, wanted)

    def _arrange(self, held: dict[int, tuple[int, int]], wanted: dict[int, tuple[list[int], list[int]]]) -> None:
        """Give every wanted slot a row, and carry over what it held."""
        places: dict[int, tuple[int, int]] = {}
        for capacity, (decoding, others) in wanted.items():
            rows = _rows(capacity, decoding, others, held)
            places |= {slot: (capacity, row) for row, slot in enumerate(rows)}
            if capacity not in self.banks:
                self.banks[capacity] = self._empty(capacity)
            bank = self.banks[capacity]
            bank.slots, bank.num_decode = rows, len(decoding)
        # What moves is read everywhere before it is written anywhere: rows change places.
        moved: dict[tuple[int, int], list[int]] = {}
        for slot, place in places.items():
            if slot in held and held[slot] != place:
                moved.setdefault((held[slot][0], place[0]), []).append(slot)
        carried = [
            (source, target, slots, [layer[:, [held[s][1] for s in slots]] for layer in self.banks[source].layers])
            for (source, target), slots in moved.items()
        ]
        self.banks = {capacity: bank for capacity, bank in self.banks.items() if capacity in wanted}
        tight = sum(capacity * max(bank.rows, len(bank.slots)) for capacity, bank in self.banks.items()) > self._budget
        for capacity, bank in self.banks.items():
            self._fit(capacity, bank, tight)
        for source, target, slots, values in carried:
            rows = [places[slot][1] for slot in slots]
            for layer, value in zip(self.banks[target].layers, values, strict=True):
                layer[:, rows, :, :source] = value  # no sequence gets less room than it had
        fresh = {slot: place for slot, place in places.items() if held.get(slot, (0, 0))[0] < place[0]}
        for slot, (capacity, row) in fresh.items():
            begin = held[slot][0] if slot in held else 0
            for layer in self.banks[capacity].layers:
                layer[:, row, :, begin:] = 0  # whatever an ended sequence left there, it must be finite
        self._places = places

    def _fit(self, capacity: int, bank: Bank, tight: bool) -> None:
        """Rows for all that are in use; some more where it grows, fewer where most are unused; no others if `tight`."""
        used = len(bank.slots)
        if tight or not used <= bank.rows <= 2 * used + SPARE_ROWS:
            spare = 0 if tight else min(used // GROWTH + 1, (self._budget - self.tokens) // capacity + bank.rows - used)
            if used + max(0, spare) != bank.rows:
                bank.resize(used + max(0, spare))

    def _empty(self, capacity: int) -> Bank:
        heads, dim = self._shape
        return Bank([self._like.new_empty(2, 0, heads, capacity, dim) for _ in range(self._num_layers)])


def _rows(capacity: int, decoding: Sequence[int], others: Sequence[int], held: dict[int, tuple[int, int]]) -> list[int]:
    """The slot of each row of a bank: decoding ones first, and whoever can stay where it is does."""
    rows: list[int | None] = [None] * (len(decoding) + len(others))
    for slots, first, last in ((decoding, 0, len(decoding)), (others, len(decoding), len(rows))):
        movers = []
        for slot in slots:
            bank, row = held.get(slot, (0, 0))
            if bank == capacity and first <= row < last:
                rows[row] = slot
            else:
                movers.append(slot)
        free = (row for row in range(first, last) if rows[row] is None)
        for slot, row in zip(movers, list(free), strict=True):
            rows[row] = slot
    return [slot for slot in rows if slot is not None]


@dataclass(frozen=True, eq=False)
class _Decoding:
    """The decoding rows of one bank. slots_N: where they are in the stream; None: they are all of it, in order."""

    capacity: int
    slots_N: Tensor | None
    rows_N: Tensor
    positions_N: Tensor
    longest: int
    mask_NP: Tensor | None


class CachedAttention:
    """The `AttentionContext` of one step: new tokens go into the cache and see what is there."""

    def __init__(self, cache: KVCache, plan: StepPlan, device: torch.device) -> None:
        self.cache = cache
        self.plan = plan
        self._decoding = [
            _decoding(capacity, bank, plan, device) for capacity, bank in cache.banks.items() if bank.num_decode
        ]
        order = [slot for bank in cache.banks.values() for slot in bank.slots[: bank.num_decode]]
        in_order = order == list(range(plan.num_decode))
        # From the order of the banks to that of the stream.
        self._back_N = None if in_order else torch.tensor(order, device=device).argsort()

    def attend(self, layer: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor) -> Tensor:
        """See `model.attention.AttentionContext`."""
        outputs = []
        if self._decoding:
            decoded = torch.cat([self._decode(part, layer, query_THD, key_TGD, value_TGD) for part in self._decoding])
            outputs.append(decoded if self._back_N is None else decoded[self._back_N])
        start = self.plan.num_decode
        for piece in self.plan.prefills:
            rows = slice(start, start + piece.length)
            upto = piece.start + piece.length
            keys_GCD, values_GCD = self.cache.row(layer, piece.slot)
            keys_GCD[:, piece.start : upto] = key_TGD[rows].transpose(0, 1)
            values_GCD[:, piece.start : upto] = value_TGD[rows].transpose(0, 1)
            start = rows.stop
        outputs += self._attend_prefills(layer, query_THD, key_TGD, value_TGD)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode(self, part: _Decoding, layer: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor) -> Tensor:
        count = len(part.rows_N)
        keys_SGCD, values_SGCD = self.cache.banks[part.capacity].layers[layer].unbind(0)
        chosen = slice(0, count) if part.slots_N is None else part.slots_N
        keys_SGCD[part.rows_N, :, part.positions_N] = key_TGD[chosen]
        values_SGCD[part.rows_N, :, part.positions_N] = value_TGD[chosen]
        seen = (slice(0, count), slice(None), slice(0, part.longest))
        return decode_attention(query_THD[chosen], keys_SGCD[seen], values_SGCD[seen], part.mask_NP)

    def _attend_prefills(self, layer: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor) -> list[Tensor]:
        pieces = self.plan.prefills
        base = self.plan.num_decode
        if all(piece.start == 0 for piece in pieces):
            return [
                attention_of_equals(
                    query_THD[base + rows.start : base + rows.stop],
                    key_TGD[base + rows.start : base + rows.stop],
                    value_TGD[base + rows.start : base + rows.stop],
                    count,
                    is_causal=True,
                )
                for rows, count in equal_length_runs([piece.length for piece in pieces])
            ]
        outputs = []
        for piece in pieces:
            keys_GPD, values_GPD = self.cache.row(layer, piece.slot)[:, :, : piece.start + piece.length]
            outputs.append(attend_to_prefix(query_THD[base : base + piece.length], keys_GPD, values_GPD))
            base += piece.length
        return outputs


def _decoding(capacity: int, bank: Bank, plan: StepPlan, device: torch.device) -> _Decoding:
    slots = bank.slots[: bank.num_decode]
    positions = plan.decode_positions[slots]
    longest = int(positions.max()) + 1
    positions_N = torch.from_numpy(positions).to(device, torch.int64)
    even = int(positions.min()) + 1 == longest
    in_order = slots == list(range(plan.num_decode))
    return _Decoding(
        capacity,
        slots_N=None if in_order else torch.tensor(slots, device=device),
        rows_N=torch.arange(len(slots), device=device),
        positions_N=positions_N,
        longest=longest,
        mask_NP=None if even else torch.arange(longest, device=device) <= positions_N[:, None],
    )
