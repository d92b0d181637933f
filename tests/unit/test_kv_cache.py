"""The KV cache keeps what it is given through moves and growth; attention over it is plain causal attention."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from ray_ministral.captioning.kv_cache import CachedAttention, KVCache
from ray_ministral.captioning.plan import Prefill, StepPlan
from ray_ministral.model.attention import CausalAttention

HEADS, GROUPS, DIM, LAYERS = 6, 2, 4, 2
CPU = torch.device("cpu")


def make_cache(budget: int = 10_000) -> KVCache:
    return KVCache(LAYERS, GROUPS, DIM, torch.float32, CPU, token_budget=budget)


def make_plan(
    decode: list[int] | None = None, prefills: list[tuple[int, int, int]] | None = None, *, moves: Any = ()
) -> StepPlan:
    """`decode` are positions; `prefills` are (slot, start, length)."""
    return StepPlan(
        step=0,
        microbatch=0,
        moves=tuple(moves),
        token_ids=np.empty(0, np.int32),
        decode_positions=np.asarray(decode or [], dtype=np.int32),
        prefills=tuple(Prefill(slot, start, length, True) for slot, start, length in prefills or []),
        sample_keys=np.empty(0, np.uint64),
        sample_positions=np.empty(0, np.int64),
    )


def test_an_empty_cache_holds_nothing() -> None:
    assert make_cache().nbytes == 0


def test_memory_follows_what_sequences_hold() -> None:
    """One of a thousand tokens beside twenty short ones: each has its own blocks, and gives them back."""
    cache = make_cache()
    short = [(slot, 0, 3) for slot in range(1, 21)]
    cache.prepare(make_plan(prefills=[(0, 0, 1000), *short]))
    element = 2 * GROUPS * DIM * 4 * LAYERS
    needed = 1024 + 20 * 64
    assert needed <= cache.tokens <= 1.3 * needed + 1024
    assert cache.nbytes == cache.tokens * element
    cache.prepare(make_plan([3] * 20, moves=[(20, 0)]))
    assert 20 * 64 <= cache.tokens <= 1.3 * 20 * 64
    cache.prepare(make_plan([4]))
    assert cache.tokens <= 10 * 64
    cache.prepare(make_plan())
    assert cache.tokens == cache.nbytes == 0


def test_nothing_is_copied_where_there_is_room() -> None:
    cache = make_cache()
    cache.prepare(make_plan(prefills=[(0, 0, 3), (1, 0, 3)]))
    layers = list(cache.banks[64].layers)
    cache.prepare(make_plan([3, 3]))
    cache.prepare(make_plan([4, 4]))
    assert all(a is b for a, b in zip(layers, cache.banks[64].layers, strict=True))


def test_a_new_row_is_finite_whatever_was_there() -> None:
    """A masked place counts 0 times: of a NaN that would be a NaN."""
    cache = make_cache()
    cache.prepare(make_plan(prefills=[(0, 0, 3), (1, 0, 3)]))
    for layer in cache.banks[64].layers:
        layer.fill_(float("nan"))
    cache.prepare(make_plan(prefills=[(0, 0, 5)]))
    assert all(bool((cache.row(layer, 0) == 0).all()) for layer in range(LAYERS))


def test_the_budget_is_kept_where_that_is_possible() -> None:
    cache = make_cache(budget=128)
    cache.prepare(make_plan(prefills=[(0, 0, 3), (1, 0, 3)]))
    assert cache.tokens == 128
    cache.prepare(make_plan([3, 64]))
    assert cache.tokens == 64 + 128, "the sequences themselves need more"


@pytest.mark.parametrize("seed", range(40))
def test_random_plans(seed: int) -> None:
    """Sequences come (some in pieces), move, grow through the blocks and end; what each has written is found again.

    A sequence writes its own mark at each position, as decoding does.
    """
    chance = random.Random(seed)
    cache = make_cache()
    slots: list[tuple[float, int]] = []  # by slot: the mark of a sequence, and the tokens that it holds
    half_in: list[tuple[float, int]] = []  # prompts of which a piece is in; they come after the decoding ones
    mark = 0.0

    def check(slot: int, value: float, tokens: int) -> None:
        for layer in range(LAYERS):
            row = cache.row(layer, slot)
            assert bool((row[:, :, :tokens] == value + 1000 * layer).all())
            assert bool((row[:, :, tokens:] == 0).all())

    for _ in range(80):
        moves = []
        alive = [chance.random() < 0.8 for _ in slots]
        while False in alive:
            hole = alive.index(False)
            if True not in alive[hole:]:
                break
            last = len(alive) - 1 - alive[::-1].index(True)
            moves.append((last, hole))
            slots[hole] = slots[last]
            alive[hole], alive[last] = True, False
        ended = alive.count(False)
        first_half = len(slots)
        slots = [slot for slot, lives in zip(slots, alive, strict=True) if lives]
        moves += [(first_half + index, len(slots) + index) for index in range(len(half_in)) if ended]
        grow = chance.choice([1, 1, 1, 20])
        plan_decode = [tokens + grow - 1 for _, tokens in slots]
        pieces = [(len(slots) + i, tokens, chance.randint(1, 40)) for i, (_, tokens) in enumerate(half_in)]
        begin = len(slots) + len(half_in)
        new = [(begin + i, 0, chance.randint(1, 150)) for i in range(chance.choice([0, 0, 1, 3]))]
        cache.prepare(make_plan(plan_decode, [*pieces, *new], moves=moves))
        marks = [value for value, _ in [*slots, *half_in]] + [mark + 1 + i for i in range(len(new))]
        mark += len(new)
        before = [tokens for _, tokens in [*slots, *half_in]] + [0] * len(new)
        after = [place + 1 for place in plan_decode] + [start + length for _, start, length in [*pieces, *new]]
        for slot, (value, old, tokens) in enumerate(zip(marks, before, after, strict=True)):
            check(slot, value, old)
            for layer in range(LAYERS):
                cache.row(layer, slot)[:, :, old:tokens] = value + 1000 * layer
        everything = list(zip(marks, after, strict=True))
        halves = len(everything) - len(new) + chance.randint(0, len(new))
        slots, half_in = everything[:halves], everything[halves:]
        for capacity, bank in cache.banks.items():
            assert bank.rows >= len(bank.slots) > 0
            assert all(slot < len(plan_decode) for slot in bank.slots[: bank.num_decode])
            assert all(slot >= len(plan_decode) for slot in bank.slots[bank.num_decode :])
            assert all(capacity - 64 - 63 <= after[slot] <= capacity for slot in bank.slots)


# Attention


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of one whole sequence `[L, heads, D]`, written out in float64."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) / DIM**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.double()).float()


def sequences(lengths: list[int], seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(2 * torch.randn(length, heads, DIM, generator=generator) for heads in (HEADS, GROUPS, GROUPS))  # type: ignore[misc]
        for length in lengths
    ]


@pytest.mark.parametrize("lengths", [[1], [5], [3, 3, 3], [4, 4, 1, 1, 7], [1, 2, 3]])
def test_causal_attention(lengths: list[int]) -> None:
    given = sequences(lengths)
    query, key, value = (torch.cat(parts) for parts in zip(*given, strict=True))
    out = CausalAttention(lengths).attend(0, query, key, value)
    torch.testing.assert_close(out, torch.cat([reference(*one) for one in given]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dirty", [0.0, 1e4])
@pytest.mark.parametrize("lengths", [[9, 9], [12, 3, 7], [2, 15], [6]])
def test_cached_attention_step_by_step(lengths: list[int], dirty: float) -> None:
    """Prompts of one to five tokens, some in two pieces, then token by token; the slots held something else before."""
    given = sequences(lengths, seed=len(lengths))
    expected = [reference(*one) for one in given]
    cache = make_cache()
    cache.prepare(make_plan(prefills=[(slot, 0, 1) for slot in range(len(lengths))]))
    for layer in cache.banks[64].layers:
        layer.fill_(dirty)
    prompts = [1 + index % 2 + min(3, length - 3) if length > 3 else 1 for index, length in enumerate(lengths)]
    results: list[list[torch.Tensor]] = [[] for _ in lengths]

    def step(plan: StepPlan, pieces: list[tuple[int, int, int]]) -> None:
        """`pieces` are (sequence, start, stop), in the order of the plan's stream."""
        cache.prepare(plan)
        context = CachedAttention(cache, plan, CPU)
        query, key, value = (torch.cat([given[s][part][a:b] for s, a, b in pieces]) for part in range(3))
        for layer in range(LAYERS):
            out = context.attend(layer, query, key, value)
        for (sequence, _, _), part in zip(pieces, out.split([b - a for _, a, b in pieces]), strict=True):
            results[sequence].append(part)

    cuts = [prompt // 2 for prompt in prompts]
    first = [(slot, 0, cut) for slot, cut in enumerate(cuts) if cut]
    if len(first) == len(lengths):  # prompts in pieces must have all slots in the plan
        step(make_plan(prefills=first), [(s, 0, cut) for s, _, cut in first])
    else:
        cuts = [0] * len(lengths)
    rest = [(slot, cut, prompt - cut) for slot, (cut, prompt) in enumerate(zip(cuts, prompts, strict=True))]
    step(make_plan(prefills=rest), [(s, start, start + length) for s, start, length in rest])
    alive = list(range(len(lengths)))  # by slot
    places = dict(enumerate(prompts))
    while alive:
        moves = []
        ended = [slot for slot, sequence in enumerate(alive) if places[sequence] == lengths[sequence]]
        for slot in ended[::-1]:
            if slot != len(alive) - 1:
                moves.append((len(alive) - 1, slot))
                alive[slot] = alive[-1]
            alive.pop()
            if moves:
                break  # one at a time keeps this loop simple; the others are seen in the next turn
        if not alive:
            break
        if any(places[sequence] == lengths[sequence] for sequence in alive):
            cache.prepare(make_plan([0] * len(alive), moves=moves))
            continue
        plan = make_plan([places[sequence] for sequence in alive], moves=moves)
        step(plan, [(sequence, places[sequence], places[sequence] + 1) for sequence in alive])
        for sequence in alive:
            places[sequence] += 1
    for parts, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-4, atol=1e-5)


def test_decoding_and_prompts_in_one_step() -> None:
    given = sequences([6, 9, 4, 4])
    cache = make_cache()
    query, key, value = (torch.cat([given[0][part][:5], given[1][part][:8]]) for part in range(3))
    plan = make_plan(prefills=[(0, 0, 5), (1, 0, 8)])
    cache.prepare(plan)
    CachedAttention(cache, plan, CPU).attend(1, query, key, value)
    plan = make_plan([5, 8], [(2, 0, 4), (3, 0, 4)])
    cache.prepare(plan)
    query, key, value = (
        torch.cat([given[0][part][5:], given[1][part][8:], given[2][part], given[3][part]]) for part in range(3)
    )
    out = CachedAttention(cache, plan, CPU).attend(1, query, key, value)
    wanted = [reference(*given[0])[5:], reference(*given[1])[8:], reference(*given[2]), reference(*given[3])]
    torch.testing.assert_close(out, torch.cat(wanted), rtol=1e-4, atol=1e-5)
