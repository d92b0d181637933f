"""Two replicas of one stage on real actors against one with the same global batch; and a stage that trains nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_ministral.config import OptimizerConfig, PipelineConfig, SampleConfig, TrainConfig
from ray_ministral.driver.trainer import train
from tests.cluster.train_runs import curve, final_weights, metrics, write_pairs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@pytest.fixture
def config(model: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model),
        train=(str(write_pairs(tmp_path / "pairs.parquet")),),
        output="to be replaced",
        samples=SampleConfig(response_column="response"),
        optimizer=OptimizerConfig(learning_rate=3e-4, clip_norm=0.1, adam_eps=1e-6),
        pipeline=PipelineConfig(dtype="float32", threads_per_stage=1, step_timeout_s=300),
        global_batch_size=10,
        microbatch_size=2,
        steps=3,
    )


def run(config: TrainConfig, output: Path, stages: int, replicas: int = 1, **changes: Any) -> list[dict[str, Any]]:
    pipeline = replace(config.pipeline, stages=stages, replicas=replicas)
    train(replace(config, output=str(output), pipeline=pipeline, **changes))
    return metrics(output)


def test_two_replicas_are_one_but_for_the_order_of_sums(config: TrainConfig, tmp_path: Path) -> None:
    """Five microbatches: two for one replica, three for the other. See tests/parity/test_train_replicas.py for which
    bits are the same."""
    one = run(config, tmp_path / "one", 1)
    two = run(config, tmp_path / "two", 1, replicas=2)
    assert [line["tokens"] for line in two] == [line["tokens"] for line in one]
    assert two[0]["loss"] == one[0]["loss"], "the first loss is the same to the bit"
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-6)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["grad_norm"] for line in two] == pytest.approx([line["grad_norm"] for line in one], rel=1e-3)
    ours, theirs = final_weights(tmp_path / "two"), final_weights(tmp_path / "one")
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()), name
    # The same on two stages: the bits of two replicas do not depend on how each is cut.
    cut = run(config, tmp_path / "cut", 2, replicas=2)
    assert curve(cut) == curve(two)


def test_a_stage_that_trains_nothing(config: TrainConfig, tmp_path: Path) -> None:
    """The language model is frozen: the second stage only passes gradients on, and its weights stay as they were."""
    frozen = replace(config, freeze=("language",))
    whole = run(frozen, tmp_path / "whole", 1)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in whole)
    run(frozen, tmp_path / "halves", 2, steps=2)
    assert curve(run(frozen, tmp_path / "halves", 2)) == curve(whole)
    ours, theirs = final_weights(tmp_path / "halves"), final_weights(tmp_path / "whole")
    assert all(ours[name].equal(theirs[name]) for name in theirs)
