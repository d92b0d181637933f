"""Ladder C, for training: one stage's bits on any number of stages, uneven splits, every schedule, activations kept or
computed anew: loss and norm of each step, every gradient, every weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ministral.config import OptimizerConfig
from tests.parity.test_train_resume import DTYPES, assert_same_bits
from tests.parity.train_runs import FOUR, INTERLEAVED, ONE, THREE, TWO, Layout, make_batch, run

STEPS = 2
DECAY = OptimizerConfig(weight_decay=0.1)
HALVES = [
    [
        TWO,
        Layout((2, 1, 1), 3, "1f1b"),
        INTERLEAVED,
        Layout((1, 1, 1, 1), 4, "gpipe"),
        Layout((1, 3), 2, "zero-bubble"),
    ],
    [Layout((2, 2), 2, "gpipe"), THREE, Layout((1, 1, 2), 3, "gpipe"), FOUR, Layout((1, 1, 1, 1), 4, "1f1b")],
]
SIX_LAYERS = [
    Layout((1, 2, 2, 1), 2, "interleaved"),
    Layout((1, 1, 1, 1, 1, 1), 3, "interleaved"),
    Layout((1, 1, 1, 1, 1, 1), 2, "interleaved"),
    Layout((3, 1, 2), 3, "zero-bubble"),
]


@dataclass(frozen=True)
class Outcome:
    """What a run comes to. gradients: of one more step, before clipping, without its commit."""

    curve: list[tuple[float, float]]
    losses: tuple[float, ...]
    squared_norms: dict[str, float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def outcome(layout: Layout, model_dir: Path, microbatches: int, **options: Any) -> Outcome:
    pipeline = layout.pipeline(model_dir, optimizer=DECAY, **options)
    curve = run(pipeline, layout, range(STEPS), microbatches)
    batch = make_batch(STEPS, microbatches)
    reports = pipeline.compute(layout.make_schedule(pipeline, microbatches), batch.microbatches, *batch.blocks)
    (losses,) = [report.losses for report in reports if report.losses]
    norms = {name: norm for report in reports for name, norm in report.squared_norms.items()}
    return Outcome(curve, losses, norms, pipeline.gradients(), pipeline.weights())


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    assert ours.curve == theirs.curve
    assert ours.losses == theirs.losses
    assert ours.squared_norms == theirs.squared_norms
    assert_same_bits(ours.gradients, theirs.gradients)
    assert_same_bits(ours.weights, theirs.weights)


@pytest.mark.parametrize(
    ("dtype", "tied", "microbatches", "recomputed"),
    [("fp32", True, 5, 0), ("fp32", False, 2, 1), ("bf16", True, 2, 1), ("bf16", False, 5, 0)],
)
def test_every_layout_has_the_bits_of_one_stage(
    dtype: str, tied: bool, microbatches: int, recomputed: int, directory: Any
) -> None:
    """Two microbatches are fewer than three or four stages. One half of the layouts keeps activations, the other one
    recomputes them."""
    model_dir, options = directory(tied=tied), {"dtype": DTYPES[dtype]}
    expected = outcome(ONE, model_dir, microbatches, **options)
    assert all(gradient.any() for gradient in expected.gradients.values())
    for half, layouts in enumerate(HALVES):
        for layout in layouts:
            assert_same(outcome(layout, model_dir, microbatches, recompute=half == recomputed, **options), expected)


@pytest.mark.parametrize("layout", [TWO, INTERLEAVED, FOUR], ids=lambda layout: layout.name)
def test_a_single_microbatch(layout: Layout, directory: Any) -> None:
    model_dir = directory(tied=True)
    assert_same(outcome(layout, model_dir, 1), outcome(ONE, model_dir, 1))


@pytest.mark.parametrize("microbatches", [3, 5])
def test_two_and_three_chunks_a_stage(microbatches: int, directory: Any) -> None:
    model_dir = directory(tied=True, layers=6)
    expected = outcome(Layout((6,), 1, "gpipe"), model_dir, microbatches)
    for layout in SIX_LAYERS:
        assert_same(outcome(layout, model_dir, microbatches), expected)


def test_one_stage_with_every_schedule(directory: Any) -> None:
    """Two chunks on one stage hand over without a message; a split backward alone."""
    model_dir = directory(tied=True)
    expected = outcome(ONE, model_dir, 3)
    for layout in (Layout((4,), 1, "1f1b"), Layout((4,), 1, "zero-bubble"), Layout((1, 3), 1, "interleaved")):
        for recompute in (False, True):
            assert_same(outcome(layout, model_dir, 3, recompute=recompute), expected)


@pytest.mark.parametrize(
    "freeze",
    [(True, False, False), (False, True, True), (True, True, False)],
    ids=["language", "vision+projector", "language+vision"],
)
def test_frozen_parts(freeze: tuple[bool, bool, bool], directory: Any) -> None:
    """Chunks with nothing to train, through which gradients pass or to which none come."""
    model_dir = directory(tied=True)
    expected = outcome(ONE, model_dir, 3, freeze=freeze)
    for layout in (TWO, THREE, INTERLEAVED, FOUR):
        assert_same(outcome(layout, model_dir, 3, freeze=freeze), expected)
