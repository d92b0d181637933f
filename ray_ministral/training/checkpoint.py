"""Checkpoints of a run: committed whole or not at all, found again, the damaged passed over, the old ones taken away.

    checkpoints/
      step-00000100/
        model/          a Hugging Face directory; under LoRA one of `peft` (adapters alone)
        optimizer/      safetensors: NAME.exp_avg, NAME.exp_avg_sq, NAME.step, and NAME.master where weights are bf16
        state.json      step, data cursor, seed, config
        COMMITTED       every file with its size and SHA-256; written last
      _tmp.…            attempts: being written, or of a dead process

NAME is always the global name of a tensor in Hugging Face's model (or of an adapter in `peft`'s file), so any number of
stages can read what any other number has written. No torch here: the driver looks for checkpoints, too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_ministral.data.files import sync
from ray_ministral.errors import ConfigError, InputError
from ray_ministral.training.files import (
    TEMPORARY,
    FileRecord,
    put_in_place,
    record,
    seal,
    write_json,
)

if TYPE_CHECKING:
    from transformers import Mistral3Config

    from ray_ministral.training.lora import LoraOptions

MODEL, OPTIMIZER = "model", "optimizer"
STATE_FILE = "state.json"
MARKER = "COMMITTED"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class TrainState:
    """What a resumed run needs besides tensors; plain JSON.

    step: optimizer steps done. seed: of the order of samples and of new parameters. cursor: the next sample, as the
    order of samples has it. config: the run's, to be shown and compared.
    """

    step: int
    seed: int
    cursor: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StagePart:
    """What one stage has written. chunks: their numbers. weight_map: tensor to file, within `model/`."""

    chunks: tuple[int, ...]
    num_chunks: int
    files: tuple[FileRecord, ...]
    weight_map: Mapping[str, str]


def checkpoint_name(step: int) -> str:
    """Name of a committed checkpoint's folder."""
    return f"step-{step:08d}"


def temporary_folder(folder: Path, step: int, generation: int) -> Path:
    """Where the stages of a generation write; an attempt of an older one, still alive somewhere, writes elsewhere."""
    return folder / f"{TEMPORARY}{checkpoint_name(step)}.{generation}"


def commit_checkpoint(
    temporary: Path,
    parts: Sequence[StagePart],
    state: TrainState,
    *,
    config: Mistral3Config,
    model_dir: str | os.PathLike[str],
    lora: LoraOptions | None = None,
) -> Path:
    """When all stages have written into `temporary`: add the rest, mark it, and give it its name, which is returned.

    config: `hf_config` of any chunk. model_dir: what training began with. A checkpoint of the same step that is there
    already (damaged, or the run came here again) gives way. Raises OSError; then nothing has been committed.
    """
    _check_parts(temporary, parts)
    from ray_ministral.training.model_directory import finish_adapter, finish_model

    weight_map = {name: file for part in parts for name, file in part.weight_map.items()}
    if lora is None:
        finish_model(temporary / MODEL, weight_map, config, model_dir)
    else:
        finish_adapter(temporary / MODEL, weight_map, lora, model_dir)
    write_json(temporary / STATE_FILE, {"format": FORMAT, **asdict(state)})

    records = {written.path: written for part in parts for written in part.files}
    paths = [path.relative_to(temporary).as_posix() for path in sorted(temporary.rglob("*")) if path.is_file()]
    listing = [records[path] if path in records else seal(temporary, path) for path in paths]
    for folder in (temporary / MODEL, temporary / OPTIMIZER):
        if folder.exists():
            sync(folder)
    write_json(temporary / MARKER, {"format": FORMAT, "step": state.step, "files": [asdict(r) for r in listing]})
    destination = temporary.with_name(checkpoint_name(state.step))
    put_in_place(temporary, destination)
    return destination


def _check_parts(temporary: Path, parts: Sequence[StagePart]) -> None:
    """Each chunk once, and every file as long here as it was where it was written (another node, perhaps)."""
    chunks = sorted(chunk for part in parts for chunk in part.chunks)
    wanted = list(range(parts[0].num_chunks)) if parts else [0]
    if chunks != wanted:
        raise ValueError(f"a checkpoint needs chunks {wanted}, each once; the stages wrote {chunks}")
    for part in parts:
        for written in part.files:
            path = temporary / written.path
            size = path.stat().st_size if path.exists() else None
            if size != written.size:
                raise OSError(
                    f"{path} has {size} bytes here, {written.size} where a stage wrote it: --output must be a folder "
                    "that all nodes share"
                )


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that can be used, if any, and why newer ones can't: `name: reason`."""

    checkpoint: Path | None
    skipped: tuple[str, ...]


def latest_good(folder: Path, *, checksums: bool = False) -> Found:
    """The newest checkpoint whose files are all there with their sizes; with `checksums`, their contents, too."""
    skipped: list[str] = []
    for _, checkpoint in reversed(_checkpoints(folder)):
        reason = damage(checkpoint, checksums=checksums)
        if reason is None:
            return Found(checkpoint, tuple(skipped))
        skipped.append(f"{checkpoint.name}: {reason}")
    return Found(None, tuple(skipped))


def damage(checkpoint: Path, *, checksums: bool = False) -> str | None:
    """Why a checkpoint cannot be used; None where it can."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        if marker["format"] != FORMAT:
            return f"its format is {marker['format']!r}, this version reads {FORMAT}"
        records = [FileRecord(str(file["path"]), int(file["size"]), str(file["sha256"])) for file in marker["files"]]
    except FileNotFoundError:
        return f"it has no {MARKER}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MARKER} cannot be read: {type(error).__name__}: {error}"
    if STATE_FILE not in {expected.path for expected in records}:
        return f"its {MARKER} does not list {STATE_FILE}"
    for expected in records:
        path = checkpoint / expected.path
        try:
            size = path.stat().st_size
            if size != expected.size:
                return f"{expected.path} has {size} bytes instead of {expected.size}"
            if checksums and record(checkpoint, expected.path) != expected:
                return f"{expected.path} has another checksum than when it was written"
        except FileNotFoundError:
            return f"{expected.path} is missing"
        except OSError as error:
            return f"{expected.path} cannot be read: {error}"
    return None


def read_state(checkpoint: Path) -> TrainState:
    """The state of a checkpoint. Raises `InputError` where it is not one or is damaged."""
    reason = damage(checkpoint)
    if reason is not None:
        raise InputError(f"--resume {checkpoint} is no checkpoint that can be used: {reason}. Give another one")
    value = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    try:
        return TrainState(int(value["step"]), int(value["seed"]), value["cursor"], value["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{checkpoint / STATE_FILE} lacks what a resume needs: {error!r}") from error


def prune(folder: Path, keep: int) -> list[str]:
    """Delete all checkpoints older than the `keep` newest good ones; returns their names.

    A damaged one never counts as kept, and one that is newer than the oldest kept is left for people to look at.
    """
    if keep < 1:
        raise ConfigError(f"--keep-checkpoints must be at least 1, got {keep}")
    deleted: list[str] = []
    good = 0
    for _, checkpoint in reversed(_checkpoints(folder)):
        if good == keep:
            _delete(checkpoint)
            deleted.append(checkpoint.name)
        elif damage(checkpoint) is None:
            good += 1
    return deleted


def remove_attempts(folder: Path) -> None:
    """Delete what dead processes left half-written; call it before the stages of a run write their first."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def publish_model(checkpoint: Path, destination: Path) -> None:
    """Give the model of a checkpoint a place of its own (`final/`), whole or not at all.

    Weights are linked, not copied, where the file system can: they outlive the checkpoint and take no room.
    """
    temporary = destination.with_name(f"{TEMPORARY}{destination.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for path in sorted((checkpoint / MODEL).iterdir()):
        if path.suffix == ".safetensors":
            _link(path, temporary / path.name)
        else:
            shutil.copyfile(path, temporary / path.name)
    put_in_place(temporary, destination)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Folders by step, ascending, good or not."""
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted((int(match[1]), path) for match, path in named)


def _delete(checkpoint: Path) -> None:
    """Under another name first: nobody may take a half-deleted checkpoint for a damaged one."""
    doomed = checkpoint.with_name(f"{TEMPORARY}deleted.{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
