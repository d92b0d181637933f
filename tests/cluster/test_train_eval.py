"""Evaluation, merged adapters and fewer stages on real stage actors; captions are those of a captioning job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from ray_ministral import caption
from ray_ministral.config import (
    CaptionConfig,
    EvalConfig,
    OptimizerConfig,
    PipelineConfig,
    PromptConfig,
    SampleConfig,
    SamplingConfig,
    TrainConfig,
)
from ray_ministral.driver import train_replicas
from ray_ministral.driver.trainer import train
from ray_ministral.errors import PlacementError

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "What is in picture {id}?"
SYSTEM = "Answer briefly."

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with answers, and the same as conversations; row 17 is broken."""
    table = pq.read_table(ROOT / "examples" / "pictures.parquet").slice(0, 40)
    answers = [f"I can see {text or 'nothing'}." for text in table["expected"].to_pylist()]
    chats = [
        json.dumps(
            [
                {"role": "user", "content": PROMPT.format(id=id_)},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": "Thank you."},
            ]
        )
        for id_, answer in zip(table["id"].to_pylist(), answers, strict=True)
    ]
    table = table.append_column("response", pa.array(answers)).append_column("chat", pa.array(chats))
    path = tmp_path_factory.mktemp("pictures") / "pictures.parquet"
    pq.write_table(table, path, row_group_size=16)
    return path


def make(model: Path, pictures: Path, output: Path, samples: SampleConfig, **options: Any) -> TrainConfig:
    pipeline = {"threads_per_stage": 1, "step_timeout_s": 240} | options.pop("pipeline", {})
    defaults: dict[str, Any] = {"global_batch_size": 4, "microbatch_size": 2, "steps": 2}
    defaults["optimizer"] = OptimizerConfig(learning_rate=2e-3)
    return TrainConfig(
        model=str(model),
        train=(str(pictures),),
        output=str(output),
        samples=samples,
        pipeline=PipelineConfig(**pipeline),
        **(defaults | options),
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def captioned(model: Path, pictures: Path, output: Path, dtype: Any) -> dict[int, tuple[int, ...]]:
    """The token ids of a captioning job on the rows 0 to 19, by row."""
    caption(
        CaptionConfig(
            model=str(model),
            inputs=(str(pictures),),
            output=str(output),
            prompt=PromptConfig(prompt=PROMPT, system_prompt=SYSTEM),
            sampling=SamplingConfig(max_new_tokens=24),
            pipeline=PipelineConfig(threads_per_stage=1, dtype=dtype),
            limit=20,
            with_token_ids=True,
        )
    )
    rows = [row for part in sorted(output.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    return {row["source_row_group"] * 16 + row["source_row"]: tuple(row["token_ids"] or ()) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "interleaved bfloat16", "merged adapters"])
def test_captions_are_those_of_a_captioning_job(kind: str, model: Path, pictures: Path, tmp_path: Path) -> None:
    """With the model that the run began with, and with the one that it ends with."""
    samples = SampleConfig(prompt=PROMPT, system_prompt=SYSTEM, response_column="response")
    pipeline: dict[str, Any] = {"stages": 3, "dtype": "float32"}
    options: dict[str, Any] = {"schedule": "zero-bubble"}
    if kind == "interleaved bfloat16":
        pipeline = {"stages": 2, "dtype": "bfloat16"}
        options = {"schedule": "interleaved", "chunks_per_stage": 2}
        samples = SampleConfig(system_prompt=SYSTEM, messages_column="chat")
    elif kind == "merged adapters":
        pipeline = {"stages": 2, "dtype": "float32", "replicas": 2}
        options = {"lora_rank": 4, "lora_alpha": 16.0, "merge_lora": True}
        options["optimizer"] = OptimizerConfig(learning_rate=1e-2)
    evaluation = EvalConfig(str(pictures), captions=19, max_new_tokens=24)
    run = tmp_path / "run"
    train(make(model, pictures, run, samples, eval=evaluation, pipeline=pipeline, **options))

    said = lines(run / "captions.jsonl")
    assert {line["step"] for line in said} == {0, 2}
    found: dict[int, dict[int, tuple[int, ...]]] = {0: {}, 2: {}}
    for line in said:
        found[line["step"]][line["row_group"] * 16 + line["row"]] = tuple(line["token_ids"])
    whole = [row for row in range(20) if row != 17]
    for step, trained in ((0, model), (2, run / "final")):
        theirs = captioned(trained, pictures, tmp_path / f"captions-{step}", pipeline["dtype"])
        assert found[step] == {row: theirs[row] for row in whole}
    assert found[0] != found[2], "training has changed what it says"
    answers = pq.read_table(pictures)["response"].to_pylist()
    assert [line["expected"] for line in said if line["step"] == 2] == [answers[row] for row in whole]
    before, after = lines(run / "eval.jsonl")
    assert after["loss"] < before["loss"]
    assert (before["rows"], before["skipped"]) == (39, 1)


@pytest.fixture
def one_free_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All CPUs of the cluster but one are taken."""
    monkeypatch.setattr(train_replicas, "SHRINK_AFTER_S", 3.0)
    group = placement_group([{"CPU": ray.cluster_resources()["CPU"] - 1}])
    assert group.wait(60)
    yield
    remove_placement_group(group)


@pytest.mark.usefixtures("one_free_cpu")
def test_a_cluster_without_room_gets_fewer_stages(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = SampleConfig(response_column="response")
    pipeline = {"stages": 3, "placement_timeout_s": 3}
    config = make(model, pictures, tmp_path, samples, pipeline=pipeline, steps=1, min_stages=1)
    train(config)
    assert [line["stages"] for line in lines(tmp_path / "metrics.jsonl")] == [1]
    err = capsys.readouterr().err
    assert "trying 2 stages, as --min-stages 1 allows" in err
    assert "trying 1 stages" in err

    with pytest.raises(PlacementError, match="no room for 2 x 1 CPU"):
        train(make(model, pictures, tmp_path / "two", samples, pipeline={"stages": 2, "placement_timeout_s": 3}))
