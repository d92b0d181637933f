"""Evaluation on the training stages: the loss of a step without the step, on every layout, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ray_ministral.pipeline.generators import make_schedule
from ray_ministral.training.lora import LoraOptions
from ray_ministral.training.plan import TrainPlan
from tests.parity.train_harness import Pipeline
from tests.parity.train_runs import FOUR, INTERLEAVED, MICROBATCHES, ONE, THREE, TWO, Layout, make_batch, run


def evaluate(pipeline: Pipeline, layout: Layout, number: int) -> list[float]:
    """The sums of token losses of the microbatches of a batch."""
    batch = make_batch(number)
    schedule = make_schedule(
        layout.schedule,
        layout.num_stages,
        MICROBATCHES,
        len(layout.chunk_layers) // layout.num_stages,
        first_trainable_chunk=len(layout.chunk_layers),
    )
    total = sum(microbatch.num_targets for microbatch in batch.microbatches)
    plans = [TrainPlan(0, 0, batch.microbatches, actions, total) for actions in schedule.actions]
    with ThreadPoolExecutor(layout.num_stages) as threads:
        calls = [
            threads.submit(stage.evaluate, plan, *(batch.blocks if index == 0 else ()))
            for index, (stage, plan) in enumerate(zip(pipeline.stages, plans, strict=True))
        ]
        return [loss for call in calls for loss in call.result(60)]


@pytest.mark.parametrize("layout", [ONE, TWO, THREE, INTERLEAVED, FOUR], ids=["1", "2", "3", "interleaved", "4"])
def test_the_loss_is_the_steps_and_the_steps_stay_the_same(layout: Layout, directory: Callable[..., Path]) -> None:
    with_evaluation = layout.pipeline(directory())
    batch = make_batch(0)
    losses = evaluate(with_evaluation, layout, 0)
    reports = with_evaluation.compute(layout.make_schedule(with_evaluation), batch.microbatches, *batch.blocks)
    assert losses == [loss for report in reports for loss in report.losses]
    assert len(losses) == MICROBATCHES

    without = layout.pipeline(directory())
    curve = []
    for step in range(3):
        evaluate(with_evaluation, layout, 10 + step)
        curve += run(with_evaluation, layout, [step])
    assert curve == run(without, layout, range(3))
    ours, theirs = with_evaluation.weights(), without.weights()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LoraOptions(4, alpha=8)])
def test_every_layout_has_the_same_bits(
    lora: LoraOptions | None, dtype: torch.dtype, directory: Callable[..., Path]
) -> None:
    found = []
    for layout in (ONE, THREE, INTERLEAVED):
        pipeline = layout.pipeline(directory(), lora=lora, dtype=dtype)
        run(pipeline, layout, range(2))
        found.append(evaluate(pipeline, layout, 5))
    assert found[0] == found[1] == found[2]
