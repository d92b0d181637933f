"""Ladder D: more than twenty AdamW steps with clipping, decay and warmup have the curve of a plain Hugging Face loop.

Adam divides by the size of a gradient: a coordinate whose gradient is rounding noise moves by a whole learning rate in
either direction, in Hugging Face's run as in ours. So `adam_eps` is well above the noise here (1e-6; at 1e-8 single
coordinates of the embedding drift apart), and the rest is exact enough to tell every mistake in `test_train_mutations`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from ray_ministral.config import LearningRateName, OptimizerConfig
from tests.parity.train_reference import HuggingFaceLoop
from tests.parity.train_runs import CLIP_NORM, FOUR, INTERLEAVED, RATE, THREE, TWO, Layout, make_batch, run

STEPS = 24
OPTIMIZER = OptimizerConfig(weight_decay=0.1, adam_eps=1e-6)
LOSS, NORM, WEIGHT = 1e-5, 1e-3, 2e-3
"""Relative; five times what was measured. A weight's is of the way that it has gone since the start."""

Curve = Sequence[tuple[float, float]]


def assert_curves_agree(ours: Curve, theirs: Curve) -> None:
    assert len(ours) == len(theirs)
    for step, ((loss, norm), (their_loss, their_norm)) in enumerate(zip(ours, theirs, strict=True)):
        assert loss == pytest.approx(their_loss, rel=LOSS), f"loss of step {step}"
        assert norm == pytest.approx(their_norm, rel=NORM), f"norm of step {step}"


def assert_weights_agree(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
    """`theirs` and `start` name each trained parameter."""
    for name, expected in theirs.items():
        way, off = float((expected - start[name]).norm()), float((ours[name] - expected).norm())
        assert way > 0, f"{name} has not moved"
        assert off <= WEIGHT * way, f"{name} is {off:g} off after a way of {way:g}"


@pytest.mark.parametrize(
    ("layout", "tied", "schedule"),
    [(TWO, True, "cosine"), (THREE, False, "linear"), (INTERLEAVED, True, "constant"), (FOUR, True, "cosine")],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_the_curve_is_hugging_faces(
    layout: Layout, tied: bool, schedule: LearningRateName, directory: Any, reference: Any
) -> None:
    rate = replace(RATE, peak=1e-3, schedule=schedule)
    assert rate.warmup_steps > 1
    assert rate.total_steps == STEPS + 1, "nearly to the end of the decay"
    start = HuggingFaceLoop(reference(tied=tied)).weights()
    theirs = HuggingFaceLoop(reference(tied=tied), optimizer=OPTIMIZER, rate=rate, clip_norm=CLIP_NORM)
    expected = [theirs.step(make_batch(step)) for step in range(STEPS)]

    pipeline = layout.pipeline(directory(tied=tied), optimizer=OPTIMIZER)
    curve = run(pipeline, layout, range(STEPS), rate=rate)
    assert min(norm for _, norm in curve) > 1.5 * CLIP_NORM, "clipping is to be active in every step"
    assert curve[-1][0] < 0.95 * curve[0][0], "something is learnt"
    assert_curves_agree(curve, expected)
    weights = pipeline.weights()
    if tied:
        assert weights.pop("lm_head.weight").equal(weights["model.language_model.embed_tokens.weight"])
    assert weights.keys() == theirs.weights().keys()
    assert_weights_agree(weights, theirs.weights(), start)


def test_without_clipping_and_without_decay(directory: Any, reference: Any) -> None:
    """The same numbers with both off: neither is taken for granted."""
    rate, optimizer = replace(RATE, peak=1e-3), replace(OPTIMIZER, weight_decay=0.0)
    theirs = HuggingFaceLoop(reference(), optimizer=optimizer, rate=rate)
    expected = [theirs.step(make_batch(step)) for step in range(6)]
    pipeline = TWO.pipeline(directory(), optimizer=optimizer)
    schedule = TWO.make_schedule(pipeline)
    batches = [make_batch(step) for step in range(6)]
    assert_curves_agree(
        [
            pipeline.step(schedule, batch.microbatches, *batch.blocks, learning_rate=rate.at(step), clip_norm=None)
            for step, batch in enumerate(batches)
        ],
        expected,
    )
