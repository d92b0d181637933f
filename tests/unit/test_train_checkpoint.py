"""Which checkpoint counts, what is refused, what is taken away. Tensors: tests/parity/test_train_resume.py."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_ministral.errors import ConfigError, InputError
from ray_ministral.training import checkpoint as module
from ray_ministral.training.checkpoint import (
    StagePart,
    TrainState,
    commit_checkpoint,
    damage,
    latest_good,
    prune,
    publish_model,
    read_state,
    remove_attempts,
    temporary_folder,
)
from ray_ministral.training.files import FileRecord, seal
from ray_ministral.training.lora import LoraOptions
from ray_ministral.training.model_directory import copy_companions
from tests.unit.model_directory import make_model_directory

CONTENTS = {
    "model/model-00001-of-00001.safetensors": b"weights",
    "optimizer/optimizer-00001-of-00001.safetensors": b"moments",
    "state.json": json.dumps({"format": 1, "step": 0, "seed": 3, "cursor": {"epoch": 1}, "config": {"a": 1}}).encode(),
}


def write_checkpoint(folder: Path, step: int) -> Path:
    """A committed checkpoint, written here by the format's description, not by the code under test."""
    checkpoint = folder / f"step-{step:08d}"
    files = []
    for path, content in CONTENTS.items():
        (checkpoint / path).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / path).write_bytes(content)
        files.append({"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    (checkpoint / "COMMITTED").write_text(json.dumps({"format": 1, "step": step, "files": files}))
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_by_number_not_by_name_or_time(tmp_path: Path) -> None:
    newest = write_checkpoint(tmp_path, 123_456_789)
    for step in (10, 9, 100):
        write_checkpoint(tmp_path, step)
    os.utime(newest, (0, 0))
    (tmp_path / "step-00000200").write_text("a file")
    (tmp_path / "step-0000300x").mkdir()
    (tmp_path / "_tmp.step-00000400.1").mkdir()
    found = latest_good(tmp_path, checksums=True)
    assert found.checkpoint == newest
    assert found.skipped == ()


def test_the_driver_can_look_for_checkpoints_without_torch(root: Path) -> None:
    program = "import sys, ray_ministral.training.checkpoint; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60, check=True)


def test_nothing_there(tmp_path: Path) -> None:
    assert latest_good(tmp_path / "nowhere").checkpoint is None
    assert latest_good(tmp_path).checkpoint is None


def marker(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "COMMITTED"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "no marker": (lambda c: (c / "COMMITTED").unlink(), "no COMMITTED"),
    "half a marker": (
        lambda c: (c / "COMMITTED").write_bytes((c / "COMMITTED").read_bytes()[:-20]),
        "COMMITTED cannot be read",
    ),
    "an empty marker": (lambda c: (c / "COMMITTED").write_text(""), "COMMITTED cannot be read"),
    "zeros for a marker": (lambda c: (c / "COMMITTED").write_bytes(b"\0" * 400), "COMMITTED cannot be read"),
    "a marker of something else": (lambda c: (c / "COMMITTED").write_text("[1]"), "COMMITTED cannot be read"),
    "a marker that lists nothing": (lambda c: marker(c, files=[]), r"does not list state\.json"),
    "a format to come": (lambda c: marker(c, format=2), "format is 2, this version reads 1"),
    "a truncated file": (
        lambda c: (c / "optimizer/optimizer-00001-of-00001.safetensors").write_bytes(b"moment"),
        "optimizer-00001.* has 6 bytes instead of 7",
    ),
    "a missing file": (
        lambda c: (c / "model/model-00001-of-00001.safetensors").unlink(),
        "model-00001.* is missing",
    ),
    "a missing state": (lambda c: (c / "state.json").unlink(), r"state\.json is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_one_before_a_damaged_one(name: str, tmp_path: Path) -> None:
    good, damaged = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    assert latest_good(tmp_path).checkpoint == damaged
    spoil, reason = DAMAGES[name]
    spoil(damaged)
    found = latest_good(tmp_path)
    assert found.checkpoint == good
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith("step-00000002: ")
    with pytest.raises(InputError, match=rf"--resume .*step-00000002 .*{reason}.*another one"):
        read_state(damaged)


def test_contents_only_on_demand(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    (checkpoint / "model/model-00001-of-00001.safetensors").write_bytes(b"Weights")
    assert damage(checkpoint) is None
    assert "another checksum" in str(damage(checkpoint, checksums=True))
    assert latest_good(tmp_path, checksums=True).checkpoint is None


def test_reading_the_state(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 5)
    assert read_state(checkpoint) == TrainState(0, 3, {"epoch": 1}, {"a": 1})
    short = json.dumps({"step": 1}).encode()
    (checkpoint / "state.json").write_bytes(short)
    entries = json.loads((checkpoint / "COMMITTED").read_text())["files"]
    marker(checkpoint, files=[e | {"size": len(short)} if e["path"] == "state.json" else e for e in entries])
    with pytest.raises(InputError, match=r"state\.json lacks .*seed"):
        read_state(checkpoint)


def test_pruning_keeps_good_ones(tmp_path: Path) -> None:
    for step in range(1, 7):
        write_checkpoint(tmp_path, step)
    for step in (2, 4, 6):
        (tmp_path / f"step-{step:08d}" / "COMMITTED").unlink()
    (tmp_path / "other").mkdir()
    assert prune(tmp_path, 2) == ["step-00000002", "step-00000001"]
    # 5 and 3 are the two good ones; 4 and 6 are damaged and newer than what is kept.
    assert names(tmp_path) == ["other", *(f"step-{step:08d}" for step in (3, 4, 5, 6))]
    assert prune(tmp_path, 2) == []
    assert prune(tmp_path, 1) == ["step-00000004", "step-00000003"]
    assert latest_good(tmp_path).checkpoint == tmp_path / "step-00000005"
    with pytest.raises(ConfigError, match="--keep-checkpoints must be at least 1, got 0"):
        prune(tmp_path, 0)


def test_attempts_are_removed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    dead = temporary_folder(tmp_path, 2, generation=4)
    dead.mkdir()
    (dead / "part").touch()
    assert dead != temporary_folder(tmp_path, 2, generation=5)
    remove_attempts(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


# Committing: under LoRA it needs no whole model, so a few bytes will do here.


def write_part(temporary: Path, chunk: int, chunks: int) -> StagePart:
    name = f"model-{chunk + 1:05d}-of-{chunks:05d}.safetensors"
    for folder in ("model", "optimizer"):
        (temporary / folder).mkdir(parents=True, exist_ok=True)
    save_file({f"a{chunk}": torch.full((3,), float(chunk))}, temporary / "model" / name)
    save_file({f"a{chunk}.step": torch.tensor(7.0)}, temporary / "optimizer" / name)
    files = tuple(seal(temporary, f"{folder}/{name}") for folder in ("model", "optimizer"))
    return StagePart((chunk,), chunks, files, {f"a{chunk}": name})


def commit(temporary: Path, parts: list[StagePart], model_dir: Path, step: int = 7) -> Path:
    config: Any = None
    state = TrainState(step, 1, {"epoch": 0, "index": 28}, {"learning_rate": 0.1})
    return commit_checkpoint(temporary, parts, state, config=config, model_dir=model_dir, lora=LoraOptions(2))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return make_model_directory(tmp_path / "source")


def test_a_commit_is_complete(tmp_path: Path, model_dir: Path) -> None:
    folder = tmp_path / "checkpoints"
    temporary = temporary_folder(folder, 7, 1)
    parts = [write_part(temporary, chunk, 2) for chunk in (1, 0)]
    assert latest_good(folder).checkpoint is None
    checkpoint = commit(temporary, parts, model_dir)
    assert names(folder) == ["step-00000007"]
    assert latest_good(folder, checksums=True).checkpoint == checkpoint
    assert read_state(checkpoint) == TrainState(7, 1, {"epoch": 0, "index": 28}, {"learning_rate": 0.1})
    listed = {file["path"] for file in json.loads((checkpoint / "COMMITTED").read_text())["files"]}
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert listed == there - {"COMMITTED"}
    assert load_file(checkpoint / "model" / "adapter_model.safetensors").keys() == {"a0", "a1"}


def test_a_crash_before_the_marker_commits_nothing(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stops before the last rename, no step-… is there; and the next run takes the rest away."""
    steps = ("sync", "write_json", "put_in_place")
    for number, name in enumerate(steps):
        folder = tmp_path / name
        temporary = temporary_folder(folder, 7, 1)
        parts = [write_part(temporary, 0, 1)]

        def crash(*_: Any, **__: Any) -> None:
            raise OSError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(module, name, crash)
            with pytest.raises(OSError, match="full"):
                commit(temporary, parts, model_dir)
        assert latest_good(folder).checkpoint is None, number
        assert names(folder) == [temporary.name]
        remove_attempts(folder)
        assert names(folder) == []


def test_the_marker_is_written_last(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = temporary_folder(tmp_path / "checkpoints", 7, 1)
    written: list[str] = []
    original = module.write_json

    def watch(path: Path, value: Any) -> None:
        assert "COMMITTED" not in written
        written.append(path.name)
        original(path, value)

    monkeypatch.setattr(module, "write_json", watch)
    commit(temporary, [write_part(temporary, 0, 1)], model_dir)
    assert written == ["state.json", "COMMITTED"]


def test_a_checkpoint_of_the_same_step_gives_way(tmp_path: Path, model_dir: Path) -> None:
    folder = tmp_path / "checkpoints"
    damaged = write_checkpoint(folder, 7)
    (damaged / "COMMITTED").unlink()
    temporary = temporary_folder(folder, 7, 2)
    checkpoint = commit(temporary, [write_part(temporary, 0, 1)], model_dir)
    assert checkpoint == damaged
    assert damage(checkpoint, checksums=True) is None
    assert names(folder) == ["step-00000007"]


def test_incomplete_parts_are_refused(tmp_path: Path, model_dir: Path) -> None:
    temporary = temporary_folder(tmp_path / "checkpoints", 7, 1)
    first, second = (write_part(temporary, chunk, 2) for chunk in (0, 1))
    for parts in ([first], [first, first], [first, second, second], []):
        with pytest.raises(ValueError, match="each once"):
            commit(temporary, parts, model_dir)
    record = second.files[0]
    short = StagePart(second.chunks, 2, (FileRecord(record.path, record.size + 1, record.sha256),), second.weight_map)
    with pytest.raises(OSError, match=rf"has {record.size} bytes here, {record.size + 1} where.*all nodes share"):
        commit(temporary, [first, short], model_dir)
    lost = StagePart(second.chunks, 2, (FileRecord("model/lost", 5, ""),), second.weight_map)
    with pytest.raises(OSError, match="has None bytes here, 5 where"):
        commit(temporary, [first, lost], model_dir)
    assert latest_good(tmp_path / "checkpoints").checkpoint is None


def test_companions(tmp_path: Path, model_dir: Path) -> None:
    for name in ("tekken.json", "special_tokens_map.json", "merges.txt", "tokenizer.model"):
        (model_dir / name).write_text(name)
    for name in ("model.safetensors.index.json", "params.json", "adapter_config.json", "README.md", "weights.bin"):
        (model_dir / name).write_text(name)
    (model_dir / "folder.json").mkdir()
    target = tmp_path / "target"
    target.mkdir()
    copy_companions(model_dir, target)
    assert names(target) == [
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "processor_config.json",
        "special_tokens_map.json",
        "tekken.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("links", [True, False])
def test_publishing_survives_the_checkpoint(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoints", 1)
    (checkpoint / "model" / "config.json").write_text("{}")
    if not links:

        def refuse(*_: Any) -> None:
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refuse)
    final = tmp_path / "final"
    publish_model(checkpoint, final)
    # Whoever edits the published config must not spoil the checkpoint.
    (final / "config.json").write_text('{"edited": true}')
    assert (checkpoint / "model" / "config.json").read_text() == "{}"
    second = write_checkpoint(tmp_path / "checkpoints", 2)
    assert prune(tmp_path / "checkpoints", 1) == ["step-00000001"]
    assert (final / "model-00001-of-00001.safetensors").read_bytes() == b"weights"
    publish_model(second, final)
    assert names(tmp_path) == ["checkpoints", "final"]
    assert names(final) == ["model-00001-of-00001.safetensors"]
