"""Sampling: the filters of Hugging Face's `generate`, random numbers that belong to a row and a position."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ray_ministral.captioning import sampling as module
from ray_ministral.captioning.sampling import sample, uniforms
from ray_ministral.config import SamplingConfig

VOCABULARY = 60
DRAWS = 20_000


def warped(logits_V: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """Probabilities `[V]` that Hugging Face's `generate` would draw from."""
    scores = TemperatureLogitsWarper(config.temperature)(None, logits_V[None])  # type: ignore[arg-type]
    if config.top_k is not None:
        scores = TopKLogitsWarper(config.top_k)(None, scores)  # type: ignore[arg-type]
    if config.top_p is not None:
        scores = TopPLogitsWarper(config.top_p)(None, scores)  # type: ignore[arg-type]
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 2, 10, VOCABULARY, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.9, 1.0])
def test_the_distribution_is_hugging_faces(
    temperature: float, top_k: int | None, top_p: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With draws evenly spaced over [0, 1), each token comes as often as its probability says, to one draw."""
    even = (np.arange(DRAWS) + 0.5) / DRAWS
    monkeypatch.setattr(module, "uniforms", lambda *_: even)
    logits_V = 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3))
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = sample(logits_V.expand(DRAWS, -1), config, np.zeros(DRAWS), np.zeros(DRAWS))
    assert tokens.dtype == torch.int64
    counts = tokens.bincount(minlength=VOCABULARY)
    expected = warped(logits_V, config).double()
    assert ((counts - expected * DRAWS).abs() <= 1.01).all()
    assert not counts[expected == 0].any(), "a token that is filtered out never comes"


@pytest.mark.parametrize("seed", range(5))
def test_frequencies_with_real_random_numbers(seed: int) -> None:
    logits_V = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    config = SamplingConfig(temperature=0.8, top_k=20, top_p=0.95, seed=seed)
    keys = np.random.default_rng(seed).integers(0, 2**64, 4000, dtype=np.uint64)
    tokens = sample(logits_V.expand(4000, -1), config, keys, np.arange(4000))
    expected = warped(logits_V, config)
    frequencies = tokens.bincount(minlength=VOCABULARY) / 4000
    assert ((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_each_row_has_its_own_logits() -> None:
    """Greedy or nearly so, in a batch."""
    logits_NV = torch.randn(30, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 5
    keys, positions = np.arange(30, dtype=np.uint64), np.arange(30)
    best = logits_NV.argmax(-1)
    for config in (
        SamplingConfig(),
        SamplingConfig(temperature=0.0, top_k=3, top_p=0.5),
        SamplingConfig(temperature=5.0, top_k=1),
        SamplingConfig(temperature=5.0, top_p=1e-9),
        SamplingConfig(temperature=1e-3),
    ):
        assert torch.equal(sample(logits_NV, config, keys, positions), best)


def test_a_draw_does_not_depend_on_the_batch() -> None:
    logits_NV = torch.randn(40, VOCABULARY, generator=torch.Generator().manual_seed(1))
    config = SamplingConfig(temperature=1.5, top_p=0.9, seed=5)
    keys = np.random.default_rng(1).integers(0, 2**64, 40, dtype=np.uint64)
    positions = np.arange(40) * 3
    together = sample(logits_NV, config, keys, positions)
    order = np.random.default_rng(2).permutation(40)
    shuffled = sample(logits_NV[order], config, keys[order], positions[order])
    assert torch.equal(shuffled, together[order])
    alone = [sample(logits_NV[i : i + 1], config, keys[i : i + 1], positions[i : i + 1]) for i in range(40)]
    assert torch.equal(torch.cat(alone), together)


def test_a_draw_on_a_boundary_takes_the_token_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws lie in [0, 1): four equal tokens own a quarter each, with its lower end."""
    draws = np.asarray([0.0, 0.25, 0.5, 0.75, np.nextafter(0.25, 0), np.nextafter(1, 0)])
    monkeypatch.setattr(module, "uniforms", lambda *_: draws)
    tokens = sample(torch.zeros(6, 4), SamplingConfig(temperature=1.0), np.zeros(6), np.zeros(6))
    assert tokens.tolist() == [0, 1, 2, 3, 0, 3]


def test_no_rows() -> None:
    for temperature in (0.0, 1.0):
        tokens = sample(torch.empty(0, 5), SamplingConfig(temperature=temperature), np.empty(0), np.empty(0))
        assert tokens.shape == (0,)


def test_bfloat16_logits() -> None:
    logits_NV = torch.randn(8, VOCABULARY, generator=torch.Generator().manual_seed(4)).bfloat16()
    config = SamplingConfig(temperature=0.7, top_k=5)
    arguments = (config, np.arange(8, dtype=np.uint64), np.arange(8))
    assert torch.equal(sample(logits_NV, *arguments), sample(logits_NV.float(), *arguments))


def test_uniforms_are_uniform() -> None:
    draws = uniforms(0, np.arange(5000, dtype=np.uint64), np.zeros(5000, dtype=np.int64))
    assert draws.dtype == np.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    histogram, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert abs(histogram - 500).max() < 5 * np.sqrt(500 * 0.9)
    for other in (
        uniforms(0, np.arange(5000, dtype=np.uint64), np.ones(5000, dtype=np.int64)),
        uniforms(1, np.arange(5000, dtype=np.uint64), np.zeros(5000, dtype=np.int64)),
        np.roll(draws, 1),
    ):
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.07


@pytest.mark.parametrize("seed", [0, 1, 2**53, 2**63 - 1])
def test_every_bit_of_seed_key_and_position_counts(seed: int) -> None:
    """Hashes are 64 bits wide: as float64, which numpy likes to make of them, the last ones would be lost."""
    keys = [0, 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1]
    positions = [0, 1, 2, 262_143]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws = [
            float(uniforms(s, np.asarray([key], dtype=np.uint64), np.asarray([position]))[0])
            for s in {seed, max(seed - 1, 0)}
            for key in keys
            for position in positions
        ]
    assert len(set(draws)) == len(draws)


def test_draws_stay_what_they_are() -> None:
    """A resumed job must go on with the same numbers, on any machine and after any update of ours.

    The values are numpy's Philox for key (seed, row) and counter (position), which numpy promises to keep.
    """
    expected = [
        np.random.Generator(
            np.random.Philox(
                key=np.asarray([9, key], dtype=np.uint64), counter=np.asarray([0, 0, 0, position], dtype=np.uint64)
            )
        ).random()
        for key, position in ((2**64 - 1, 40), (3, 41))
    ]
    found = uniforms(9, np.asarray([2**64 - 1, 3], dtype=np.uint64), np.asarray([40, 41]))
    assert found.tolist() == expected
