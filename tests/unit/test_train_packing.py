"""Samples into microbatches: nothing lost, evenly filled, always the same."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from ray_ministral.errors import ConfigError
from ray_ministral.training.packing import build_microbatches, num_microbatches, pack
from ray_ministral.training.plan import IGNORED
from ray_ministral.training.targets import TrainSample


def fullest(counts: list[int], packed: tuple[tuple[int, ...], ...]) -> int:
    return max(sum(counts[index] for index in indices) for indices in packed)


def best(counts: list[int], number: int) -> int:
    """The least that the fullest microbatch can have, by trying everything."""
    best_so_far = sum(counts)
    for choice in product(range(number), repeat=len(counts)):
        loads = [0] * number
        for count, index in zip(counts, choice, strict=True):
            loads[index] += count
        best_so_far = min(best_so_far, max(loads))
    return best_so_far


@pytest.mark.parametrize("seed", range(30))
def test_a_partition_in_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 300, rng.integers(1, 40)).tolist()
    number = int(rng.integers(1, 12))
    packed = pack(counts, number)
    assert sorted(index for indices in packed for index in indices) == list(range(len(counts)))
    assert len(packed) == min(number, len(counts))
    assert all(indices == tuple(sorted(indices)) and indices for indices in packed)
    assert list(packed) == sorted(packed)
    assert pack(counts, number) == packed


@pytest.mark.parametrize("seed", range(20))
def test_the_fullest_is_near_the_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    number = int(rng.integers(2, 4))
    counts = rng.integers(1, 100, 8).tolist()
    got, least = fullest(counts, pack(counts, number)), best(counts, number)
    assert got <= least * (4 / 3 - 1 / (3 * number))


def test_longest_first_to_the_lightest() -> None:
    assert pack([2, 3, 5, 7, 4, 3], 2) == ((0, 1, 3), (2, 4, 5))
    assert pack([7, 7, 7, 7], 2) == ((0, 2), (1, 3))
    assert pack([1, 1, 100], 2) == ((0, 1), (2,))
    assert pack([5, 6, 7], 1) == ((0, 1, 2),)


def test_fewer_samples_than_microbatches() -> None:
    assert pack([5, 9], 4) == ((0,), (1,))
    assert pack([], 4) == ()


def test_many_samples_fill_evenly() -> None:
    counts = np.random.default_rng(0).integers(40, 400, 256).tolist()
    packed = pack(counts, 32)
    assert fullest(counts, packed) < 1.02 * sum(counts) / 32
    in_order = [tuple(range(8 * index, 8 * index + 8)) for index in range(32)]
    assert fullest(counts, packed) < 0.8 * fullest(counts, tuple(in_order))


def test_how_many_microbatches() -> None:
    assert [num_microbatches(16, size) for size in (1, 2, 3, 5, 16)] == [16, 8, 6, 4, 1]
    for wrong in (0, 17):
        with pytest.raises(ConfigError, match=f"--microbatch-size {wrong} must lie"):
            num_microbatches(16, wrong)


def test_counts_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="positive counts"):
        pack([1, 0], 2)
    with pytest.raises(ValueError, match="a microbatch at least"):
        pack([1], 0)


def sample(length: int, images: int, first: int) -> TrainSample:
    ids = np.arange(first, first + length, dtype=np.int32)
    targets = np.full(length, IGNORED, dtype=np.int32)
    targets[-2] = ids[-1]
    return TrainSample(ids, targets, ((28, 28),) * images, prompt_tokens=1)


def test_microbatches_know_their_pixels() -> None:
    blocks = [[sample(4, 1, 100), None, sample(6, 2, 200)], [sample(5, 0, 300), sample(3, 1, 400)]]
    first, second = build_microbatches(blocks, 2)
    assert (first.lengths, second.lengths) == ((4, 5), (6, 3))
    assert first.token_ids.tolist() == [100, 101, 102, 103, 300, 301, 302, 303, 304]
    assert second.token_ids.tolist() == [200, 201, 202, 203, 204, 205, 400, 401, 402]
    assert first.images == ((0, 0),)
    assert second.images == ((0, 2), (1, 1))
    assert (first.num_targets, second.num_targets) == (2, 2)
    assert first.targets[2] == 103
    assert second.targets.dtype == second.token_ids.dtype == np.int32
    assert first.positions().tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]


def test_a_step_in_which_nothing_is_left() -> None:
    assert build_microbatches([[None, None], []], 4) == ()
