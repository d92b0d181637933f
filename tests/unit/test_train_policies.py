"""How many stages a run goes on with, as tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_ministral.config import PipelineConfig, SampleConfig, TrainConfig
from ray_ministral.driver.policies import Death, Decision, FailurePolicy
from ray_ministral.driver.train_policies import ScalingPolicy

CONFIG = TrainConfig(
    model="m",
    train=("t",),
    output="o",
    samples=SampleConfig(response_column="r"),
    steps=10,
    pipeline=PipelineConfig(stages=3),
)


@pytest.mark.parametrize(
    ("possible", "before", "survivors", "room", "stages"),
    [
        ((3,), 3, 2, 1, 3),
        ((3,), 3, 2, 0, None),
        ((2, 3), 3, 2, 0, 2),
        ((2, 3), 3, 2, 1, 3),
        ((2, 3), 3, 1, 0, None),
        ((2, 3), 3, 1, 1, 2),
        ((1, 2, 3, 4), 3, 2, 9, 3),
        ((1, 2, 3, 4), 2, 0, 2, 2),
        ((2, 4), 4, 3, 0, 2),
    ],
)
def test_after_a_loss(possible: tuple[int, ...], before: int, survivors: int, room: int, stages: int | None) -> None:
    policy = ScalingPolicy(possible)
    assert policy.after_loss(before, survivors, room) == stages
    if stages is None:
        assert policy.after_loss(before, survivors, room + policy.waits_for(survivors + room)) is not None


@pytest.mark.parametrize(("stages", "above"), [(1, 2), (2, 4), (3, 4), (4, None)])
def test_growing(stages: int, above: int | None) -> None:
    assert ScalingPolicy((1, 2, 4)).next_above(stages) == above


@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({}, (3,)),
        ({"min_stages": 2}, (2, 3)),
        ({"min_stages": 1, "max_stages": 5}, (1, 2, 3, 4)),  # four layers
        ({"min_stages": 2, "pipeline": PipelineConfig(stages=3, replicas=2)}, (3,)),
        (
            {"min_stages": 1, "schedule": "interleaved", "chunks_per_stage": 2, "pipeline": PipelineConfig(stages=2)},
            (1, 2),
        ),
    ],
)
def test_the_possible_numbers(changes: dict[str, object], possible: tuple[int, ...]) -> None:
    assert ScalingPolicy.of(replace(CONFIG, **changes), 4).possible == possible  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "decision"),
    [
        ([0, 0, 0], Decision.REPLACE),
        ([0, 0, 0, 0], Decision.GIVE_UP),
        ([0, 0, 1, 0, 0, 0], Decision.REPLACE),
        ([5, 0, 0, 0, 0], Decision.GIVE_UP),
    ],
)
def test_a_loop_of_crashes_ends(steps: list[int], decision: Decision) -> None:
    """Deaths in training: what counts as done between two of them are steps."""
    assert FailurePolicy(max_restarts=3).decide([Death("", count) for count in steps]) is decision
