"""The output folder: whose it is, what is committed, what is finished; on a disk and on an object store."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
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
from ray_ministral.data import lease as lease_module
from ray_ministral.data import ledger as ledger_module
from ray_ministral.data import parts
from ray_ministral.data.files import Location, locate, typed_full_disk, write_file
from ray_ministral.data.fingerprint import fingerprint, model_identity
from ray_ministral.data.holder import Holder
from ray_ministral.data.ledger import Ledger
from ray_ministral.data.parts import Attempt, PartInfo, write_part
from ray_ministral.data.shards import Shard, ShardPlan, plan_shards
from ray_ministral.errors import ConfigError, LeaseLostError, ModelError, OutputError
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

    monkeypatch.setattr(lease_module, "SETTLE_S", 0.05)
    monkeypatch.setattr(ledger_module, "locate", fake_locate)
    monkeypatch.setattr(parts, "locate", fake_locate)
    return "remote://bucket/out"


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    pq.write_table(pa.table({"image": [b"x"] * 5, "id": range(5)}), tmp_path / "in.parquet")
    return list(plan_shards([str(tmp_path / "in.parquet")], rows_per_shard=2).shards)


def attempt_at(ledger: Ledger, shard: Shard, status: str = "ok", caption: str = "c") -> Attempt:
    """Its first row has the status."""
    results = [
        replace(result(row, status if row == shard.start else "ok"), caption=caption)
        for row in range(shard.start, shard.stop)
    ]
    return write_part(shard, results, output=ledger.output, carried_columns=["id"])


def commit(ledger: Ledger, shard: Shard, status: str = "ok", caption: str = "c") -> PartInfo:
    return ledger.commit(attempt_at(ledger, shard, status, caption), generation=3)


@contextmanager
def opened(output: str, job: dict[str, Any] = PRINT, **options: Any) -> Iterator[Ledger]:
    ledger = Ledger.open(output, job, **options)
    with closing(ledger):
        yield ledger


def entries(ledger: Ledger) -> list[str]:
    return sorted(ledger_module._names(ledger._folder))


def entry_names(ledger: Ledger) -> list[str]:
    return sorted(ledger_module._names(ledger._entries))


def test_a_job_from_begin_to_end(output: str, shards: list[Shard]) -> None:
    with opened(output) as ledger:
        assert ledger.committed() == {}
        assert not ledger.is_finished
        commit(ledger, shards[0])
        commit(ledger, shards[2], "bad_image")
    with opened(output) as again:
        committed = again.committed()
        assert list(committed) == [shards[0].part_name, shards[2].part_name]
        assert [(info.rows, info.ok, info.errors) for info in committed.values()] == [(2, 2, 0), (1, 0, 1)]
        assert dict(committed[shards[2].part_name].status_counts) == {"bad_image": 1}
        assert all(info.bytes > 0 for info in committed.values())
        assert commit(again, shards[1]).rows == 2
        assert again.summary() is None
        attempt_at(again, shards[1])  # an orphan's
        again.finish({"rows": 5, "ok": 4})
    with opened(output) as last:
        assert last.is_finished
        assert last.summary() == {"rows": 5, "ok": 4}
        names = [shard.part_name for shard in shards]
        assert entries(last) == sorted(["_SUCCESS", "_job.json", "_ledger", "_lease.json", "summary.json", *names])
        assert entry_names(last) == sorted(["_format.json", *(f"{name}.json" for name in names)])
        last.reopen()
        assert not last.is_finished
        last.reopen()
    assert "_lease.json" not in entries(last), "given back"


def test_an_entry_says_what_the_file_is(output: str, shards: list[Shard]) -> None:
    with opened(output) as ledger:
        info = commit(ledger, shards[0], "engine_error")
        place = ledger._folder.child(shards[0].part_name)
        with place.filesystem.open_input_stream(place.path) as stream:
            data = stream.read()
        entry = ledger._entry_of(shards[0].part_name)
    assert entry is not None
    assert entry.info == info
    assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (entry.rows, entry.status_counts, entry.generation) == (2, {"engine_error": 1, "ok": 1}, 3)
    assert entry.fingerprint == ledger._fingerprint
    assert entry.next is None


def test_another_job_is_refused_with_the_differences(output: str) -> None:
    with opened(output):
        pass
    other = {**PRINT, "prompt": {"template": "Ho"}, "limit": 5, "seed": 1}
    with pytest.raises(ConfigError) as caught:
        Ledger.open(output, other)
    message = str(caught.value)
    assert 'prompt.template: "Hi" -> "Ho"' in message
    assert "limit: null -> 5" in message
    assert "seed: (absent) -> 1" in message
    assert "model" not in message
    assert "--output" in message
    with opened(output):
        pass


def test_many_differences_are_counted(output: str) -> None:
    with opened(output, {f"key{n:02}": n for n in range(20)}):
        pass
    with pytest.raises(ConfigError, match="and 12 more"):
        Ledger.open(output, {f"key{n:02}": n + 1 for n in range(20)})


def test_attempts_of_dead_jobs_are_removed(output: str, shards: list[Shard]) -> None:
    with opened(output) as ledger:
        commit(ledger, shards[0])
        stale = attempt_at(ledger, shards[1]).name
        with ledger._entries.filesystem.open_output_stream(ledger._entries.child("_tmp.x.json.0").path) as stream:
            stream.write(b"{")
    assert stale in entries(ledger)
    with opened(output, create=False) as looking:
        assert list(looking.committed()) == [shards[0].part_name]
    assert stale in entries(ledger), "create=False must not write"
    with opened(output) as again:
        assert entries(again) == ["_job.json", "_lease.json", "_ledger", shards[0].part_name]
        assert entry_names(again) == ["_format.json", f"{shards[0].part_name}.json"]


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty and was not begun by a captioning job.*thesis\.txt"):
        Ledger.open(str(tmp_path), PRINT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "_tmp._job.json.0123").write_text("the attempt that died before it had begun the folder")
    (tmp_path / "_ledger").mkdir()
    with opened(str(tmp_path)) as ledger:
        assert not ledger.is_finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_job.json", "_ledger"]
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


def test_a_later_format_is_refused(output: str) -> None:
    with opened(output) as ledger:
        write_file(ledger._entries, "_format.json", b'{"format": 2}')
    with pytest.raises(ConfigError, match=r"_format\.json has format 2, .* knows format 1"):
        Ledger.open(output, PRINT)


def test_create_false_writes_nothing(tmp_path: Path) -> None:
    with opened(str(tmp_path / "out"), create=False) as ledger:
        assert ledger.committed() == {}
        assert not ledger.is_finished
    assert not (tmp_path / "out").exists()


# --- what counts -----------------------------------------------------------------------------------------------------


def overwrite(ledger: Ledger, folder: Location, name: str, data: bytes) -> None:
    with folder.filesystem.open_output_stream(folder.child(name).path) as stream:
        stream.write(data)


def _no_entry(ledger: Ledger, name: str) -> None:
    ledger._entries.filesystem.delete_file(ledger._entries.child(f"{name}.json").path)


def _no_file(ledger: Ledger, name: str) -> None:
    ledger._folder.filesystem.delete_file(ledger._folder.child(name).path)


def _half_a_file(ledger: Ledger, name: str) -> None:
    overwrite(ledger, ledger._folder, name, b"PAR1 half")


def _empty_entry(ledger: Ledger, name: str) -> None:
    overwrite(ledger, ledger._entries, f"{name}.json", b"")


def _list_for_entry(ledger: Ledger, name: str) -> None:
    overwrite(ledger, ledger._entries, f"{name}.json", b"[1]")


def _changed_entry(ledger: Ledger, name: str, **changes: Any) -> None:
    entry = ledger._entry_of(name)
    assert entry is not None
    overwrite(ledger, ledger._entries, f"{name}.json", replace(entry, **changes).to_bytes())


def _miscounted_entry(ledger: Ledger, name: str) -> None:
    _changed_entry(ledger, name, rows=3)


def _entry_of_another_job(ledger: Ledger, name: str) -> None:
    _changed_entry(ledger, name, fingerprint="0" * 64)


def _entry_of_another_part(ledger: Ledger, name: str) -> None:
    _changed_entry(ledger, name, part="part-00000-00000-00000099.parquet")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_entry, "it was never entered"),
        (_no_file, "the file is gone"),
        (_half_a_file, "the file has 9 bytes, wanted"),
        (_empty_entry, "its entry is damaged"),
        (_list_for_entry, "its entry is damaged"),
        (_miscounted_entry, "its entry is damaged: it has 3 rows, but counts 2"),
        (_entry_of_another_job, "its entry is damaged: it is of another job"),
        (_entry_of_another_part, "its entry is damaged: it is that of part-00000-00000-00000099"),
    ],
)
def test_a_part_that_does_not_count_is_done_again(
    output: str,
    shards: list[Shard],
    damage: Callable[[Ledger, str], None],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = shards[0].part_name
    with opened(output) as ledger:
        commit(ledger, shards[0])
        commit(ledger, shards[1])
        damage(ledger, name)
    for create in (False, True):
        caplog.clear()
        with opened(output, create=create) as again:
            assert list(again.committed()) == [shards[1].part_name]
            assert f"{name} ({said}" in caplog.text
            assert shards[1].part_name not in caplog.text
            if create:
                assert f"{name}.json" not in entry_names(again), "it must not speak for the file that comes next"
                commit(again, shards[0], caption="another")
                assert list(again.committed()) == [shards[0].part_name, shards[1].part_name]


def test_many_parts_that_do_not_count_are_counted(
    tmp_path: Path, shards: list[Shard], caplog: pytest.LogCaptureFixture
) -> None:
    with opened(str(tmp_path / "out")) as ledger:
        for row in range(8):
            overwrite(ledger, ledger._folder, f"part-00000-00000-{row:08}.parquet", b"")
        assert ledger.committed() == {}
    assert len(caplog.records) == 1
    assert "and 3 more" in caplog.text


# --- parts from before there was a ledger ----------------------------------------------------------------------------


def test_a_folder_from_before_is_adopted(output: str, shards: list[Shard], caplog: pytest.LogCaptureFixture) -> None:
    with opened(output) as ledger:
        infos = [commit(ledger, shards[0]), commit(ledger, shards[2], "bad_image")]
        overwrite(ledger, ledger._folder, shards[1].part_name, b"PAR1 no parquet PAR1")
        for name in entry_names(ledger):
            ledger._entries.filesystem.delete_file(ledger._entries.child(name).path)
        ledger._entries.filesystem.delete_dir(ledger._entries.path)
    caplog.set_level("INFO")
    names = [shards[0].part_name, shards[2].part_name]
    with opened(output, create=False) as looking:
        assert list(looking.committed().values()) == infos
        assert entry_names(looking) == []
    with opened(output) as again:
        assert entry_names(again) == sorted(["_format.json", *(f"{name}.json" for name in names)])
        assert "adopting 2 parts" in caplog.text
        assert f"{shards[1].part_name} is not a part" in caplog.text
        assert list(again.committed().values()) == infos
        commit(again, shards[2])
        assert again.committed()[shards[2].part_name].errors == 0
    caplog.clear()
    with opened(output) as third:
        third.committed()
        assert "adopting" not in caplog.text


def test_a_crash_while_adopting(tmp_path: Path, shards: list[Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path / "out")
    with opened(output) as ledger:
        for shard in shards:
            commit(ledger, shard)
        for name in entry_names(ledger):
            (tmp_path / "out" / "_ledger" / name).unlink()
    real, entered = Ledger._enter, []

    def enter(self: Ledger, entry: Any) -> None:
        if len(entered) == 1:
            raise RuntimeError("killed")
        entered.append(entry)
        real(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "READS_AT_ONCE", 1)
        patch.setattr(Ledger, "_enter", enter)
        with pytest.raises(RuntimeError, match="killed"):
            Ledger.open(output, PRINT)
    with opened(output) as again:
        assert list(again.committed()) == [shard.part_name for shard in shards]


# --- a full disk -----------------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does, by the kernel's own limit on the size of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_a_part(tmp_path: Path, shards: list[Shard]) -> None:
    with opened(str(tmp_path / "out")) as ledger:
        with files_of_at_most(1000), pytest.raises(OutputError, match=r"part-.*no room: .*the same command goes on"):
            attempt_at(ledger, shards[0])
        assert entries(ledger) == ["_job.json", "_lease.json", "_ledger"]
        commit(ledger, shards[0])
        assert list(ledger.committed()) == [shards[0].part_name]


def test_no_room_for_an_entry(tmp_path: Path, shards: list[Shard]) -> None:
    with opened(str(tmp_path / "out")) as ledger:
        attempt = attempt_at(ledger, shards[0])
        with files_of_at_most(20), pytest.raises(OutputError, match="no room"):
            ledger.commit(attempt, generation=0)
        assert entry_names(ledger) == ["_format.json"]
        with files_of_at_most(20), pytest.raises(OutputError, match="no room"):
            ledger.finish({"rows": 5, "seconds": 123.456})
    with opened(str(tmp_path / "out")) as again:
        assert again.committed() == {}
        assert not again.is_finished


def test_no_room_for_the_lease_of_a_new_job(tmp_path: Path) -> None:
    with files_of_at_most(20), pytest.raises(OutputError, match="no room"):
        Ledger.open(str(tmp_path / "out"), PRINT)
    assert list((tmp_path / "out").iterdir()) == []
    with opened(str(tmp_path / "out")):
        pass


def test_a_full_disk_is_told_from_other_errors() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with pytest.raises(OutputError), typed_full_disk("x"):
            raise OSError(number, "x")
    with pytest.raises(OSError, match="Permission"), typed_full_disk("x"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_an_attempt_that_the_driver_cannot_see(tmp_path: Path, shards: list[Shard]) -> None:
    """A worker on another node, with a disk of its own."""
    with opened(str(tmp_path / "out")) as ledger:
        attempt = attempt_at(ledger, shards[0])
        (tmp_path / "out" / attempt.name).unlink()
        with pytest.raises(OutputError, match="a folder that all nodes share"):
            ledger.commit(attempt, generation=0)
        assert ledger.committed() == {}


def test_two_jobs_on_one_output(output: str, shards: list[Shard]) -> None:
    with opened(output) as ledger:
        attempt = attempt_at(ledger, shards[0])
        with pytest.raises(ConfigError, match=rf"being written by another job \(process {os.getpid()} on .*, since "):
            Ledger.open(output, PRINT)
        assert attempt.name in entries(ledger), "the living job's attempts are left alone"
        with opened(output, create=False) as looking:
            assert looking.committed() == {}
        ledger.commit(attempt, generation=0)


def test_a_job_that_was_taken_over_commits_nothing(output: str, shards: list[Shard]) -> None:
    with opened(output) as ledger:
        attempt = attempt_at(ledger, shards[0])
        other = replace(Holder.this_process(3.0), run="another", host="elsewhere")
        write_file(ledger._folder, "_lease.json", other.to_bytes())
        with pytest.raises(LeaseLostError, match=r"taken over .*elsewhere"):
            ledger.commit(attempt, generation=0)
        with pytest.raises(LeaseLostError):
            ledger.finish({})
        assert shards[0].part_name not in entries(ledger)
    assert "_lease.json" in entries(ledger), "it is the other's"


def test_relative_outputs_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with opened("out") as ledger:
        assert ledger.output == str(tmp_path / "out")


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
