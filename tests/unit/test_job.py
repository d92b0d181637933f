"""`CaptionJob`: what ends a caption, what is cut off it, and what is refused before anything starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_ministral.captioning.prompts import PromptTokenizer
from ray_ministral.config import CaptionConfig, PipelineConfig, SamplingConfig
from ray_ministral.driver.job import CaptionJob, finish_reason
from ray_ministral.errors import ConfigError
from tests.unit.model_directory import make_model_directory

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "model"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    return PromptTokenizer(make_model_directory(tmp_path_factory.mktemp("model") / "m"))


def ids_of(tokenizer: PromptTokenizer, text: str) -> list[int]:
    """Byte by byte: the tokenizer has no merges."""
    vocabulary = {tokenizer.decode([id_]): id_ for id_ in range(12, 268)}
    return [vocabulary[letter] for letter in text]


@pytest.mark.parametrize(
    ("text", "eos", "options", "reason"),
    [
        ("a cat", False, {}, None),
        ("a cat", True, {}, "stop"),
        ("a cat", True, {"ignore_eos": True}, None),
        ("a cat. A dog", False, {"stop": ("zebra", ". A")}, "stop"),
        ("a cat", True, {"ignore_eos": True, "stop": ("cat",)}, "stop"),
        ("a ca", False, {"stop": ("cat",)}, None),
    ],
)
def test_what_ends_a_caption(
    tokenizer: PromptTokenizer, text: str, eos: bool, options: dict[str, object], reason: str | None
) -> None:
    generated = ids_of(tokenizer, text) + [2] * eos
    sampling = SamplingConfig(**options)  # type: ignore[arg-type]
    assert finish_reason(generated, sampling=sampling, tokenizer=tokenizer) == reason


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"image": pa.array([b"x", b"y", None]), "id": [1, 2, 3]}), path)
    return path


def config(source: Path, **changes: object) -> CaptionConfig:
    options = {"model": str(MODEL), "inputs": (str(source),), "output": str(source.parent / "out")} | changes
    return CaptionConfig(**options)  # type: ignore[arg-type]


def test_a_caption_is_cut_before_the_first_stop_text(source: Path) -> None:
    job = CaptionJob.plan_job(config(source, sampling=SamplingConfig(stop=("circle", "red"))), create=False)
    ids = job.tokenizer.render("a red circle", (), None).tolist()
    whole = job.tokenizer.decode(ids)
    assert "a red circle" in whole
    assert job.caption_of(ids) == whole[: whole.index("red")]


def test_describing_writes_nothing_and_names_every_stage(source: Path) -> None:
    job = CaptionJob.plan_job(config(source, pipeline=PipelineConfig(stages=3)), create=False)
    text = job.describe()
    assert not (source.parent / "out").exists()
    assert "input: 3 rows of 1 files, in 1 shards" in text
    assert "columns carried over: id" in text
    for index in range(3):
        assert f"stage {index}:" in text
    assert text.count("vision tower") == text.count("output layer") == 1
    assert "where to cut is measured on the stages when the job starts; what counting FLOPs suggests:" in text
    assert sum(int(share) for share in re.findall(r"; (\d+)% of the work", text)) in {99, 100, 101}


@pytest.mark.parametrize("options", [{"stages": 1}, {"stages": 2, "layers_per_stage": (1, 3)}], ids=str)
def test_describing_speaks_of_no_measurement_where_there_will_be_none(source: Path, options: dict[str, Any]) -> None:
    job = CaptionJob.plan_job(config(source, pipeline=PipelineConfig(**options)), create=False)
    assert "measured" not in job.describe()


def test_the_longest_prompt_leaves_room_for_the_caption(source: Path) -> None:
    job = CaptionJob.plan_job(config(source, sampling=SamplingConfig(max_new_tokens=100)), create=False)
    assert job.max_prompt_tokens == 1024 - 100
    small = PipelineConfig(kv_tokens_per_microbatch=300)
    job = CaptionJob.plan_job(config(source, sampling=SamplingConfig(max_new_tokens=100), pipeline=small), create=False)
    # The last generated token is never fed back: it needs no place in the cache.
    assert job.max_prompt_tokens == 300 - 100 + 1
    with pytest.raises(ConfigError, match="--max-new-tokens 2000 leaves no room for a prompt"):
        CaptionJob.plan_job(config(source, sampling=SamplingConfig(max_new_tokens=2000)), create=False)


@pytest.mark.parametrize("layers", [(4, 1), (1, 2), (4, 0)])
def test_a_split_that_does_not_fit_is_refused(source: Path, layers: tuple[int, ...]) -> None:
    pipeline = PipelineConfig(stages=2, layers_per_stage=layers)
    with pytest.raises(ConfigError, match=r"too many|too few|empty stage"):
        CaptionJob.plan_job(config(source, pipeline=pipeline), create=False)
    assert not (source.parent / "out").exists()
