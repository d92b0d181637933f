"""Training on real stage actors: the same bits whatever the stages, schedules and interruptions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import Mistral3ForConditionalGeneration

from ray_ministral.config import EvalConfig, OptimizerConfig, PipelineConfig, SampleConfig, ScheduleName, TrainConfig
from ray_ministral.driver.trainer import train
from ray_ministral.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example pictures with their captions as answers; two rows are broken, and skipped."""
    table = pq.read_table(ROOT / "examples" / "pictures.parquet").slice(0, 70)
    answers = ["a picture" if text is None else text for text in table["expected"].to_pylist()]
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pq.write_table(table.append_column("response", pa.array(answers)), path, row_group_size=32)
    return path


@pytest.fixture(scope="module")
def config(model: Path, pairs: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model),
        train=(str(pairs),),
        output="to be replaced",
        samples=SampleConfig(response_column="response"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, clip_norm=1e-4),
        pipeline=PipelineConfig(threads_per_stage=1, step_timeout_s=240),
        global_batch_size=8,
        microbatch_size=2,
        steps=STEPS,
    )


def run(config: TrainConfig, output: Path, stages: int, schedule: ScheduleName, **changes: Any) -> list[dict[str, Any]]:
    """Train, and return the lines of metrics.jsonl."""
    replicas = changes.pop("replicas", 1)
    pipeline = replace(config.pipeline, stages=stages, replicas=replicas)
    summary = train(replace(config, output=str(output), pipeline=pipeline, schedule=schedule, **changes))
    assert summary.steps == changes.get("steps", STEPS)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(lines: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def weights(output: Path) -> dict[str, Any]:
    return dict(Mistral3ForConditionalGeneration.from_pretrained(output / "final").named_parameters())


@pytest.mark.usefixtures("cluster")
def test_stages_schedules_and_resuming_give_the_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    whole = run(config, tmp_path / "whole", 2, "1f1b")
    assert [line["step"] for line in whole] == [1, 2, 3, 4]
    assert all(line["grad_norm"] > 1e-4 for line in whole), "clipping is to be active"

    # Two steps on one layout; then on, on another, from the checkpoint. Evaluations in between change nothing.
    halves = tmp_path / "halves"
    evaluated = replace(config, eval=EvalConfig(config.train[0], every=1, limit=20, captions=3))
    run(evaluated, halves, 3, "zero-bubble", steps=2)
    assert curve(run(evaluated, halves, 1, "gpipe")) == curve(whole)
    evaluations = [json.loads(line) for line in (halves / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [0, 1, 2, 3, 4]
    assert {(line["rows"], line["skipped"]) for line in evaluations} == {(19, 1)}
    assert len({line["loss"] for line in evaluations}) == 5, "each step changes the loss"
    captions = [json.loads(line) for line in (halves / "captions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in captions] == [step for step in range(5) for _ in range(3)]
    skipped = [json.loads(line) for line in (halves / "skipped.jsonl").read_text().splitlines()]
    assert [line["row"] for line in skipped if line["step"] == 0] == [17]

    before, after = weights(tmp_path / "whole"), weights(halves)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)

    with pytest.raises(ConfigError, match="global_batch_size: 8 -> 4"):
        run(config, halves, 1, "gpipe", global_batch_size=4)


@pytest.mark.usefixtures("cluster")
def test_two_replicas_of_two_stages(config: TrainConfig, tmp_path: Path) -> None:
    one = run(config, tmp_path / "one", 1, "gpipe", steps=2)
    two = run(config, tmp_path / "two", 2, "1f1b", steps=2, replicas=2)
    # Gradients of two replicas are added in another order than those of one: nearly the same.
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["grad_norm"] for line in two] == pytest.approx([line["grad_norm"] for line in one], rel=1e-5)
    assert [line["tokens"] for line in two] == [line["tokens"] for line in one]
