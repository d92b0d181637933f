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
    decode: list[int] | None = None,
    prefills: list[tuple[int, int, int]] | None = None,
    *,
    capacity: int = 10,
    moves: Any = (),
) -> StepPlan:
    """`decode` are positions; `prefills` are (slot, start, length)."""
    return StepPlan(
        step=0,
        microbatch=0,
        moves=tuple(moves),
        capacity=capacity,
        token_ids=np.empty(0, np.int32),
        decode_positions=np.asarray(decode or [], dtype=np.int32),
        prefills=tuple(Prefill(slot, start, length, True) for slot, start, length in prefills or []),
        sample_keys=np.empty(0, np.uint64),
        sample_positions=np.empty(0, np.int64),
    )


def shapes(cache: KVCache) -> tuple[int, int]:
    """(slots, capacity), the same in each layer."""
    (shape,) = {tuple(layer.shape) for layer in cache.layers}
    assert (shape[0], shape[2], shape[4]) == (2, GROUPS, DIM)
    return shape[1], shape[3]


def test_an_empty_cache_holds_nothing() -> None:
    assert make_cache().nbytes == 0


def test_growth_keeps_contents_and_zeroes_the_rest() -> None:
    cache = make_cache()
    cache.prepare(make_plan(prefills=[(0, 0, 3), (1, 0, 3)]))
    slots, capacity = shapes(cache)
    assert slots >= 2
    assert capacity >= 10
    before = []
    for layer in cache.layers:
        layer[:, :2] = torch.randn_like(layer[:, :2])
        before.append(layer[:, :2].clone())
    cache.prepare(make_plan([3, 3], [(slot, 0, 3) for slot in range(2, 20)], capacity=200))
    assert shapes(cache) >= (20, 200)
    assert cache.nbytes == sum(layer.nbytes for layer in cache.layers) > 0
    for layer, old in zip(cache.layers, before, strict=True):
        assert torch.equal(layer[:, :2, :, :capacity], old)
        assert not layer[:, 2:].any()
        assert not layer[:, :, :, capacity:].any()


def test_no_growth_where_there_is_room() -> None:
    cache = make_cache()
    cache.prepare(make_plan(prefills=[(0, 0, 3), (1, 0, 3)]))
    layers = list(cache.layers)
    cache.prepare(make_plan([3, 3]))
    assert all(a is b for a, b in zip(layers, cache.layers, strict=True))


def test_prompts_that_are_half_in_survive_growth() -> None:
    cache = make_cache()
    cache.prepare(make_plan([5], [(1, 0, 4)]))
    for layer in cache.layers:
        layer[:, 1, :, :4] = 7
    cache.prepare(make_plan([6], [(1, 4, 4)], capacity=500))
    assert all(bool((layer[:, 1, :, :4] == 7).all()) for layer in cache.layers)


@pytest.mark.parametrize("seed", range(30))
def test_random_plans(seed: int) -> None:
    """Sequences come, move, grow and end; what each has written is found in its slot, and memory stays in bounds."""
    chance = random.Random(seed)
    budget = chance.choice([60, 300, 5000])
    cache = make_cache(budget)
    slots: list[tuple[float, int]] = []  # by slot: the mark of a sequence, and the capacity that it needs
    mark = 0.0
    for _ in range(60):
        moves = []
        alive = [chance.random() < 0.7 for _ in slots]
        while False in alive:
            hole = alive.index(False)
            if True not in alive[hole:]:
                break
            last = len(alive) - 1 - alive[::-1].index(True)
            moves.append((last, hole))
            slots[hole] = slots[last]
            alive[hole], alive[last] = True, False
        slots = [slot for slot, lives in zip(slots, alive, strict=True) if lives]
        decoding = len(slots)
        while chance.random() < 0.6:
            needs = chance.randint(1, min(budget, 70))
            if max(needs, *(c for _, c in slots), 0) * (len(slots) + 1) > budget:
                break
            mark += 1
            slots.append((mark, needs))
        if not slots:
            continue
        capacity = max(needs for _, needs in slots)
        prefills = [(slot, 0, 1) for slot in range(decoding, len(slots))]
        cache.prepare(make_plan([0] * decoding, prefills, capacity=capacity, moves=moves))
        held_slots, held_capacity = shapes(cache)
        assert held_slots >= len(slots)
        assert held_capacity >= capacity
        assert held_slots * held_capacity <= budget
        for slot, (value, needs) in enumerate(slots):
            for number, layer in enumerate(cache.layers):
                if slot < decoding:
                    assert bool((layer[:, slot, :, :needs] == value + 1000 * number).all())
                else:
                    layer[:, slot, :, :needs] = value + 1000 * number


def test_more_than_the_budget_where_one_plan_needs_it() -> None:
    cache = make_cache(budget=5)
    cache.prepare(make_plan(prefills=[(0, 0, 3)], capacity=9))
    assert shapes(cache) == (1, 9)


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
    cache.prepare(make_plan(prefills=[(slot, 0, 1) for slot in range(len(lengths))], capacity=20))
    for layer in cache.layers:
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
        step(make_plan(prefills=first, capacity=20), [(s, 0, cut) for s, _, cut in first])
    else:
        cuts = [0] * len(lengths)
    rest = [(slot, cut, prompt - cut) for slot, (cut, prompt) in enumerate(zip(cuts, prompts, strict=True))]
    step(make_plan(prefills=rest, capacity=20), [(s, start, start + length) for s, start, length in rest])
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
            cache.prepare(make_plan([0] * len(alive), capacity=20, moves=moves))
            continue
        plan = make_plan([places[sequence] for sequence in alive], capacity=20, moves=moves)
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
