"""Ladder B and F, for training: a step through the stages gives Hugging Face's loss and every one of its gradients.

A step is several packed microbatches with images; Hugging Face sees all its rows as one padded batch. fp32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tests.parity.small_models import DEFAULT_ROPE, YARN, make_row
from tests.parity.train_harness import Pipeline
from tests.parity.train_reference import PARTS, HuggingFaceLoop
from tests.parity.train_runs import FOUR, INTERLEAVED, ONE, THREE, TWO, Batch, Layout, batch_of, make_batch

RELATIVE = 5e-5
"""Of a gradient's norm: four times what was measured between the padded and the packed sum."""
OUTPUT_LAYER = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"


def assert_gradients_agree(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], zero: Collection[str] = ()
) -> None:
    """Each by its name and as a whole: the norm of the difference against the norm. `zero`: those that must vanish."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        norm = float(expected.norm())
        assert (norm == 0) == (name in zero), f"{name}: Hugging Face's norm is {norm}"
        difference = float((ours[name] - expected).norm())
        assert difference <= RELATIVE * norm, f"{name}: {difference:g} off, of {norm:g}"


def compute(pipeline: Pipeline, layout: Layout, batch: Batch) -> tuple[float, dict[str, Tensor], float]:
    """Mean loss, gradients by name (a tied output layer once) and their norm."""
    schedule = layout.make_schedule(pipeline, len(batch.microbatches))
    reports = pipeline.compute(schedule, batch.microbatches, *batch.blocks)
    targets = max(1, sum(microbatch.num_targets for microbatch in batch.microbatches))
    found = pipeline.gradients()
    if pipeline.tied and OUTPUT_LAYER in found:
        # Two parameters with one gradient: both will take the same step.
        assert found.pop(OUTPUT_LAYER).equal(found[EMBEDDING])
    squares = {name: square for report in reports for name, square in report.squared_norms.items()}
    return sum(x for report in reports for x in report.losses) / targets, found, math.sqrt(sum(squares.values()))


def assert_a_step_is_hugging_faces(
    pipeline: Pipeline, layout: Layout, batch: Batch, theirs: HuggingFaceLoop, zero: Collection[str] = ()
) -> None:
    loss, gradients, norm = compute(pipeline, layout, batch)
    their_loss, their_gradients = theirs.gradients(batch)
    assert loss == pytest.approx(their_loss, rel=1e-6)
    assert_gradients_agree(gradients, their_gradients, zero)
    assert norm == pytest.approx(math.sqrt(sum(float(g.norm()) ** 2 for g in their_gradients.values())), rel=1e-5)


@pytest.mark.parametrize("layout", [ONE, TWO, THREE, INTERLEAVED, FOUR], ids=lambda layout: layout.name)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_gradient(layout: Layout, tied: bool, directory: Any, reference: Any) -> None:
    batch = make_batch(1)
    assert any(len(microbatch.lengths) > 1 for microbatch in batch.microbatches), "sequences end to end"
    assert len({microbatch.num_targets for microbatch in batch.microbatches}) > 2, "unequal numbers of targets"
    assert {bool(microbatch.images) for microbatch in batch.microbatches} == {True, False}, "some of text alone"
    theirs = HuggingFaceLoop(reference(tied=tied))
    assert len(theirs.parameters) > 40
    assert_a_step_is_hugging_faces(layout.pipeline(directory(tied=tied)), layout, batch, theirs)


def mixed_batch(masked: Collection[int] = ()) -> Batch:
    """Images of several sizes in a row, in a microbatch and in the step; microbatches of very different length."""
    generator = np.random.default_rng(8)
    shapes: list[list[tuple[int, list[tuple[int, int]]]]] = [
        [(4, [(1, 1), (3, 2)]), (9, [(2, 3)])],
        [(50, [])],
        [(6, [(2, 2), (2, 2), (1, 4)])],
        [(5, []), (7, [(4, 1)]), (5, [])],
    ]
    rows = [[make_row(generator, text, sizes) for text, sizes in own] for own in shapes]
    return batch_of(rows, generator, masked)


@pytest.mark.parametrize("layout", [ONE, THREE], ids=lambda layout: layout.name)
def test_mixed_image_sizes(layout: Layout, directory: Any, reference: Any) -> None:
    theirs = HuggingFaceLoop(reference())
    assert_a_step_is_hugging_faces(layout.pipeline(directory()), layout, mixed_batch(), theirs)


@pytest.mark.parametrize("rope", ["yarn", "default"])
def test_positions_beyond_the_trained_ones(rope: str, directory: Any, reference: Any) -> None:
    """Most tokens stand where the query scale is not 1 and, with YARN, the angles are stretched."""
    parameters: dict[str, Any] = {"yarn": YARN, "default": DEFAULT_ROPE}[rope]
    batch = mixed_batch()
    assert max(max(m.lengths) for m in batch.microbatches) > 3 * parameters["original_max_position_embeddings"]
    assert parameters["llama_4_scaling_beta"] > 0
    theirs = HuggingFaceLoop(reference(rope=rope))
    assert_a_step_is_hugging_faces(TWO.pipeline(directory(rope=rope)), TWO, batch, theirs)


COMBINATIONS = [
    tuple(part for part, frozen in zip(PARTS, flags, strict=True) if frozen)
    for flags in product([False, True], repeat=3)
    if not all(flags)
]


def freeze_flags(frozen: Collection[str]) -> tuple[bool, bool, bool]:
    """As `Ministral3Model.freeze` takes them."""
    return "language" in frozen, "vision" in frozen, "projector" in frozen


@pytest.mark.parametrize("layout", [ONE, TWO, INTERLEAVED, FOUR], ids=lambda layout: layout.name)
@pytest.mark.parametrize("frozen", COMBINATIONS, ids=lambda parts: "+".join(parts) or "nothing")
def test_whatever_is_frozen(frozen: tuple[str, ...], layout: Layout, directory: Any, reference: Any) -> None:
    """A microbatch of text alone is among them: where only vision is trained, it has no gradient at all."""
    tied = layout in (TWO, FOUR)
    theirs = HuggingFaceLoop(reference(tied=tied), frozen=frozen)
    pipeline = layout.pipeline(directory(tied=tied), freeze=freeze_flags(frozen))
    assert_a_step_is_hugging_faces(pipeline, layout, make_batch(1), theirs)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("frozen", COMBINATIONS, ids=lambda parts: "+".join(parts) or "nothing")
def test_a_step_of_text_alone(frozen: tuple[str, ...], recompute: bool, directory: Any, reference: Any) -> None:
    """Gradients of vision are zero, not missing, and nothing crashes where there is nothing to train in a step."""
    generator = np.random.default_rng(3)
    batch = batch_of([[make_row(generator, 9)], [make_row(generator, 20), make_row(generator, 5)]], generator)
    theirs = HuggingFaceLoop(reference(), frozen=frozen)
    zero = [name for name in theirs.parameters if "vision_tower" in name or "multi_modal_projector" in name]
    pipeline = TWO.pipeline(directory(), freeze=freeze_flags(frozen), recompute=recompute)
    assert_a_step_is_hugging_faces(pipeline, TWO, batch, theirs, zero)


@pytest.mark.parametrize("masked", [[0], [3], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("layout", [ONE, TWO, THREE, INTERLEAVED], ids=lambda layout: layout.name)
def test_a_microbatch_without_targets(layout: Layout, masked: list[int], directory: Any, reference: Any) -> None:
    batch = mixed_batch(masked)
    assert [m.num_targets == 0 for m in batch.microbatches] == [index in masked for index in range(4)]
    theirs = HuggingFaceLoop(reference(tied=True))
    assert_a_step_is_hugging_faces(layout.pipeline(directory(tied=True)), layout, batch, theirs)


@pytest.mark.parametrize("layout", [ONE, THREE], ids=lambda layout: layout.name)
def test_a_step_without_targets(layout: Layout, directory: Any) -> None:
    """Hugging Face's loss would be 0 / 0. Ours is 0, and so is every gradient."""
    loss, gradients, norm = compute(layout.pipeline(directory()), layout, mixed_batch(range(4)))
    assert (loss, norm) == (0, 0)
    assert len(gradients) > 40
    assert not any(gradient.any() for gradient in gradients.values())
