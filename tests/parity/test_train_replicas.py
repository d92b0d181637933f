"""Replicas: as many pipelines share a step's microbatches and add their gradients up, and do what one would do.

Which bits are the same: all replicas have the same weights to the bit, after every step, and whatever the stages and
the schedule of each. Against a single replica, the first step's loss is the same to the bit (the same microbatches, and
their sums added in the same order). Gradients are not: one replica adds microbatches one by one, (a + b + c) + d, two
add what each has added, (a + b) + (c + d). From the second step on everything differs in the last digits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ray_ministral.config import OptimizerConfig
from tests.parity.test_train_curve import OPTIMIZER, assert_curves_agree, assert_weights_agree
from tests.parity.test_train_resume import DTYPES, assert_same_bits
from tests.parity.train_reference import HuggingFaceLoop
from tests.parity.train_runs import CLIP_NORM, FOUR, INTERLEAVED, ONE, RATE, TWO, Layout, make_batch, run, run_replicas

GENTLE = replace(RATE, peak=1e-3)


@pytest.mark.parametrize(
    ("layout", "number"), [(ONE, 2), (TWO, 2), (TWO, 3)], ids=lambda value: getattr(value, "name", str(value))
)
def test_replicas_have_hugging_faces_curve(layout: Layout, number: int, directory: Any, reference: Any) -> None:
    model_dir = directory(tied=True)
    theirs = HuggingFaceLoop(reference(tied=True), optimizer=OPTIMIZER, rate=GENTLE, clip_norm=CLIP_NORM)
    start = theirs.weights()
    replicas = layout.replicas(number, model_dir, optimizer=OPTIMIZER)
    curve = run_replicas(replicas, layout, range(6), rate=GENTLE)
    assert_curves_agree(curve, [theirs.step(make_batch(step)) for step in range(6)])
    assert_weights_agree(replicas[0].weights(), theirs.weights(), start)

    alone = run(ONE.pipeline(model_dir, optimizer=OPTIMIZER), ONE, range(6), rate=GENTLE)
    assert curve[0][0] == alone[0][0], "the first loss is the same to the bit"
    assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in alone], rel=1e-6)
    assert [norm for _, norm in curve] == pytest.approx([norm for _, norm in alone], rel=1e-4)
    assert curve[0][1] == pytest.approx(alone[0][1], rel=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_replicas_keep_the_same_bits_on_every_layout(dtype: str, directory: Any) -> None:
    """Five microbatches on two replicas: two for one, three for the other."""
    outcomes = []
    for layout in (ONE, TWO, INTERLEAVED, FOUR):
        replicas = layout.replicas(2, directory(tied=True), dtype=DTYPES[dtype], optimizer=OptimizerConfig())
        curve = run_replicas(replicas, layout, range(3), 5)
        first, second = (pipeline.weights() for pipeline in replicas)
        assert_same_bits(second, first)
        outcomes.append((curve, first))
    for curve, weights in outcomes[1:]:
        assert curve == outcomes[0][0]
        assert_same_bits(weights, outcomes[0][1])


def test_a_replica_without_a_microbatch(directory: Any, reference: Any) -> None:
    """When rows were skipped there may be fewer microbatches than replicas: those without add zeros."""
    theirs = HuggingFaceLoop(reference(), optimizer=OPTIMIZER, rate=GENTLE, clip_norm=CLIP_NORM)
    replicas = TWO.replicas(3, directory(), optimizer=OPTIMIZER)
    curve = run_replicas(replicas, TWO, range(2), 2, rate=GENTLE)
    assert_curves_agree(curve, [theirs.step(make_batch(step, 2)) for step in range(2)])
    weights = [pipeline.weights() for pipeline in replicas]
    assert_same_bits(weights[1], weights[0])
    assert_same_bits(weights[2], weights[0])
    assert all(torch.isfinite(tensor).all() for tensor in weights[0].values())
