"""The output folder: whose it is, what is committed, what is finished; on a disk and on an object store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import save_file

from ray_ministral.captioning.request import RowResult
from ray_ministral.config import CaptionConfig, ImageLimits, PipelineConfig, PromptConfig, SamplingConfig
from ray_ministral.data import ledger as ledger_module
from ray_ministral.data import parts
from ray_ministral.data.files import Location, locate
from ray_ministral.data.fingerprint import fingerprint, model_identity
from ray_ministral.data.ledger import Ledger
from ray_ministral.data.parts import write_part
from ray_ministral.data.shards import Shard, ShardPlan, plan_shards
from ray_ministral.errors import ConfigError, InputError, ModelError
from tests.unit.model_directory import make_model_directory, write_json

PRINT = {"model": {"config": "abc"}, "prompt": {"template": "Hi"}, "limit": None, "columns": ["id"]}


def result(row: int, status: str = "ok") -> RowResult:
    return RowResult(row, "c" if status == "ok" else None, status, None, None, "stop", 1, 1, 1, 1, (1,))


@pytest.fixture(params=["local", "mock", "object store"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an output folder that does not exist yet."""
    if request.param == "local":
        return str(tmp_path / "out" / "deep")
    if request.param == "mock":
        filesystem: pafs.FileSystem = pafs._MockFileSystem()
    else:
        store = MemoryFileSystem(skip_instance_cache=True)
        store.store, store.pseudo_dirs = {}, [""]
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(store))

    def fake_locate(text: str) -> Location:
        if not text.startswith("remote://"):
            return locate(text)
        return Location(name=text, location=text, filesystem=filesystem, path=text.removeprefix("remote://"))

    monkeypatch.setattr(ledger_module, "locate", fake_locate)
    monkeypatch.setattr(parts, "locate", fake_locate)
    return "remote://bucket/out"


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    pq.write_table(pa.table({"image": [b"x"] * 5, "id": range(5)}), tmp_path / "in.parquet")
    return list(plan_shards([str(tmp_path / "in.parquet")], rows_per_shard=2).shards)


def commit(ledger: Ledger, shard: Shard, status: str = "ok") -> None:
    results = [result(row, status if row == shard.start else "ok") for row in range(shard.start, shard.stop)]
    write_part(shard, results, output=ledger.output, carried_columns=["id"])


def entries(ledger: Ledger) -> list[str]:
    return sorted(ledger_module._names(ledger._folder))


def test_a_job_from_begin_to_end(output: str, shards: list[Shard]) -> None:
    ledger = Ledger.open(output, PRINT)
    assert ledger.committed() == {}
    assert not ledger.is_finished
    commit(ledger, shards[0])
    commit(ledger, shards[2], "bad_image")
    again = Ledger.open(output, PRINT)
    committed = again.committed()
    assert list(committed) == [shards[0].part_name, shards[2].part_name]
    assert [(info.rows, info.ok, info.errors) for info in committed.values()] == [(2, 2, 0), (1, 0, 1)]
    assert dict(committed[shards[2].part_name].status_counts) == {"bad_image": 1}
    assert all(info.bytes > 0 for info in committed.values())
    commit(again, shards[1])
    assert again.summary() is None
    again.finish({"rows": 5, "ok": 4})
    last = Ledger.open(output, PRINT)
    assert last.is_finished
    assert last.summary() == {"rows": 5, "ok": 4}
    assert entries(last) == sorted(["_SUCCESS", "_job.json", "summary.json", *(shard.part_name for shard in shards)])
    last.reopen()
    assert not last.is_finished
    last.reopen()


def test_another_job_is_refused_with_the_differences(output: str) -> None:
    Ledger.open(output, PRINT)
    other = {**PRINT, "prompt": {"template": "Ho"}, "limit": 5, "seed": 1}
    with pytest.raises(ConfigError) as caught:
        Ledger.open(output, other)
    message = str(caught.value)
    assert 'prompt.template: "Hi" -> "Ho"' in message
    assert "limit: null -> 5" in message
    assert "seed: (absent) -> 1" in message
    assert "model" not in message
    assert "--output" in message
    Ledger.open(output, PRINT)


def test_many_differences_are_counted(output: str) -> None:
    Ledger.open(output, {f"key{n:02}": n for n in range(20)})
    with pytest.raises(ConfigError, match="and 12 more"):
        Ledger.open(output, {f"key{n:02}": n + 1 for n in range(20)})


def test_temporary_files_of_dead_attempts_are_removed(output: str, shards: list[Shard]) -> None:
    ledger = Ledger.open(output, PRINT)
    commit(ledger, shards[0])
    stale = ledger._folder.child("_tmp.part-00000-00000-00000002.parquet.0123")
    with ledger._folder.filesystem.open_output_stream(stale.path) as stream:
        stream.write(b"half a part")
    assert stale.path.rpartition("/")[2] in entries(ledger)
    assert list(Ledger.open(output, PRINT, create=False).committed()) == [shards[0].part_name]
    assert stale.path.rpartition("/")[2] in entries(ledger), "create=False must not write"
    again = Ledger.open(output, PRINT)
    assert entries(again) == ["_job.json", shards[0].part_name]


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty and was not begun by a captioning job.*thesis\.txt"):
        Ledger.open(str(tmp_path), PRINT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "_tmp._job.json.0123").write_text("the attempt that died before it had begun the folder")
    assert not Ledger.open(str(tmp_path), PRINT).is_finished
    assert [path.name for path in tmp_path.iterdir()] == ["_job.json"]
    assert json.loads((tmp_path / "_job.json").read_text()) == PRINT


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        Ledger.open(str(tmp_path / "out"), PRINT)
    with pytest.raises(ConfigError, match="cannot be used"):
        Ledger.open(str(tmp_path / "out" / "below"), PRINT)


def test_a_job_file_that_is_not_json(tmp_path: Path) -> None:
    for content in ("{", "[]"):
        (tmp_path / "_job.json").write_text(content)
        with pytest.raises(ConfigError, match=r"_job\.json.*JSON"):
            Ledger.open(str(tmp_path), PRINT)


def test_create_false_writes_nothing(tmp_path: Path) -> None:
    ledger = Ledger.open(str(tmp_path / "out"), PRINT, create=False)
    assert ledger.committed() == {}
    assert not ledger.is_finished
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"PAR1 no parquet PAR1"])
def test_a_damaged_part(output: str, content: bytes) -> None:
    ledger = Ledger.open(output, PRINT)
    with ledger._folder.filesystem.open_output_stream(
        ledger._folder.child("part-00000-00000-00000000.parquet").path
    ) as f:
        f.write(content)
    with pytest.raises(InputError, match=r"part-00000-00000-00000000\.parquet is not a part.*delete it"):
        ledger.committed()


def test_a_part_that_somebody_else_wrote(tmp_path: Path) -> None:
    ledger = Ledger.open(str(tmp_path), PRINT)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "part-00000-00000-00000000.parquet")
    with pytest.raises(InputError, match="is not a part"):
        ledger.committed()


def test_relative_outputs_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Ledger.open("out", PRINT).output == str(tmp_path / "out")


# --- the fingerprint -------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> CaptionConfig:
    make_model_directory(tmp_path / "model")
    pq.write_table(pa.table({"image": [b"x"] * 5, "id": range(5), "t": ["a"] * 5}), tmp_path / "in.parquet")
    return CaptionConfig(
        model=str(tmp_path / "model"), inputs=(str(tmp_path / "in.parquet"),), output=str(tmp_path / "o")
    )


def plan_of(job: CaptionConfig) -> ShardPlan:
    return plan_shards(job.inputs, rows_per_shard=job.rows_per_shard, limit=job.limit, columns=job.columns)


def print_of(job: CaptionConfig) -> dict[str, Any]:
    value = fingerprint(job, plan_of(job))
    assert json.loads(json.dumps(value)) == value, "it must come back from JSON as it was"
    return value


@pytest.mark.parametrize(
    "changes",
    [
        {"pipeline": PipelineConfig(stages=3, replicas=2, threads_per_stage=1, rows_per_microbatch=4)},
        {"pipeline": PipelineConfig(device="cuda", dtype="bfloat16")},
        {"address": "local"},
        {"max_error_rate": 0.5},
        {"retry_failed": True},
        {"output": "/elsewhere"},
        {"prompt": PromptConfig(prompt="Describe this image.")},
        {"columns": ("id", "t")},
    ],
)
def test_what_does_not_make_another_job(job: CaptionConfig, changes: dict[str, Any]) -> None:
    assert print_of(replace(job, **changes)) == print_of(job)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"prompt": PromptConfig(prompt="Why?")}, "prompt"),
        ({"prompt": PromptConfig(prompt_column="t")}, "prompt"),
        ({"prompt": PromptConfig(system_prompt="Be kind.")}, "prompt"),
        ({"sampling": SamplingConfig(max_new_tokens=5)}, "sampling"),
        ({"sampling": SamplingConfig(seed=5)}, "sampling"),
        ({"sampling": SamplingConfig(max_new_tokens_column="n")}, "sampling"),
        ({"sampling": SamplingConfig(stop=("x",))}, "sampling"),
        ({"images": ImageLimits(max_pixels=5)}, "images"),
        ({"rows_per_shard": 2}, "rows_per_shard"),
        ({"limit": 3}, "limit"),
        ({"columns": ("id",)}, "columns"),
        ({"with_token_ids": True}, "with_token_ids"),
    ],
)
def test_what_makes_another_job(job: CaptionConfig, changes: dict[str, Any], key: str) -> None:
    before, after = print_of(job), print_of(replace(job, **changes))
    assert {name for name in before if before[name] != after[name]} == {key}


def test_how_long_a_row_may_take_makes_no_other_job(job: CaptionConfig) -> None:
    patient = replace(job, images=replace(job.images, deadline_s=600.0))
    assert print_of(patient) == print_of(job)


def test_the_input_is_part_of_it(job: CaptionConfig, tmp_path: Path) -> None:
    before = print_of(job)
    pq.write_table(pa.table({"image": [b"x"] * 6, "id": range(6), "t": ["a"] * 6}), tmp_path / "in.parquet")
    assert print_of(job)["inputs"] != before["inputs"]


def test_a_job_that_is_submitted_from_another_copy_is_the_same(
    job: CaptionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = []
    for name in ("copy1", "copy2"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "in.parquet").write_bytes((tmp_path / "in.parquet").read_bytes())
        monkeypatch.chdir(folder)
        make_model_directory(folder / "model")
        prints.append(print_of(replace(job, inputs=("in.parquet",), model="model")))
    assert prints[0] == prints[1]


def _chat(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ bos_token }}")


def _one_weight(folder: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    save_file({"a.weight": weights, "b.weight": weights + 2}, str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (_one_weight, "weights"),
        (_chat, "tokenizer"),
        (lambda folder: write_json(folder, "generation_config.json", {"eos_token_id": 3}), "config"),
        (lambda folder: write_json(folder, "processor_config.json", {}), "processor"),
    ],
)
def test_the_model_is_part_of_it(tmp_path: Path, change: Callable[[Path], None], key: str) -> None:
    folder = make_model_directory(tmp_path)
    before = model_identity(folder)
    change(folder)
    after = model_identity(folder)
    assert {name for name in before if before[name] != after[name]} == {key}


def test_weights_in_other_files_are_the_same_model(tmp_path: Path) -> None:
    folder = make_model_directory(tmp_path)
    before = model_identity(folder)
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    (folder / "model.safetensors").unlink()
    save_file({"a.weight": weights}, str(folder / "model-00001-of-00002.safetensors"))
    save_file({"b.weight": weights + 1}, str(folder / "model-00002-of-00002.safetensors"))
    assert model_identity(folder) == before


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02" + b"\0" * 7 + b"[]", b"\x10" + b"\0" * 7 + b"{}"])
def test_weights_that_are_no_safetensors(tmp_path: Path, content: bytes) -> None:
    folder = make_model_directory(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is not a safetensors file"):
        model_identity(folder)


def test_truncated_weights(tmp_path: Path) -> None:
    folder = make_model_directory(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="not a safetensors file"):
        model_identity(folder)


def test_no_weights(tmp_path: Path) -> None:
    folder = make_model_directory(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors"):
        model_identity(folder)
