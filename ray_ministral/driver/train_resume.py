"""What a training run goes on from, and whether it may: its output folder, its checkpoints, what they say of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray_ministral.config import TrainConfig
from ray_ministral.data.fingerprint import model_identity
from ray_ministral.errors import ConfigError
from ray_ministral.training.checkpoint import TrainState, latest_good, read_state

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
PINNED = ("train", "samples", "global_batch_size", "seed", "max_tokens", "freeze", "lora_rank", "lora_alpha")
"""What a resumed run must share with the one that it goes on with, or its curve would be another."""


def usable_folder(output: str) -> Path:
    """The output folder, which may be missing. Raises ConfigError where no files could be written there."""
    if "://" in output:
        raise ConfigError(f"--output {output} is an address: give a folder, on a file system that all nodes share")
    folder = Path(os.path.abspath(output))
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {folder} cannot be used: nothing can be written in {there}. Give another folder")
    return folder


def pinned(config: TrainConfig, model_dir: str) -> dict[str, Any]:
    """What decides which samples a step has and what is trained, as plain JSON."""
    values = asdict(config)
    model = model_identity(model_dir)
    if config.lora_rank is None:
        del model["weights"]  # all of them are in the checkpoint
    return {name: _plain(values[name]) for name in PINNED} | {"optimizer": config.optimizer.name, "model": model}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def checkpoint_to_resume(config: TrainConfig, output: Path) -> Path | None:
    """What a run begins from, None for the model itself. Raises ConfigError."""
    if config.resume == "never":
        return None
    if config.resume != "auto":
        path = Path(os.path.abspath(config.resume))
        if not path.is_dir():
            raise ConfigError(f"--resume {config.resume} is no folder: give auto, never or a checkpoint's folder")
        return path
    folder = output / CHECKPOINTS
    if not folder.is_dir():
        return None
    found = latest_good(folder)
    for skipped in found.skipped:
        logger.warning("a checkpoint cannot be used: %s", skipped)
    return found.checkpoint


def refuse_another_run(state: TrainState, held: Mapping[str, Any], path: str) -> None:
    """Raises ConfigError where a run with `held` pinned would go on from the checkpoint of one with other things."""
    different = list(_differences(state.config, held))
    if different:
        raise ConfigError(
            f"{path} belongs to another run: {'; '.join(different)}: run the same command to go on with it, or give "
            "another --output"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """What both say, and say differently. What a run of an earlier version did not know of is not compared."""
    for name in (name for name in now if name in before):
        if isinstance(now[name], Mapping) and isinstance(before[name], Mapping):
            yield from _differences(before[name], now[name], f"{within}{name}.")
        elif now[name] != before[name]:
            yield f"{within}{name}: {before[name]} -> {now[name]}"


def refuse_to_mix_runs(output: Path, resume_from: Path | None, first_step: int) -> None:
    """Raises ConfigError where there are checkpoints of later steps than a run begins with.

    They are of another curve; the next resume would take them for its own, and the pruning of old ones spare them.
    """
    found = latest_good(output / CHECKPOINTS).checkpoint
    if found is not None and found != resume_from and read_state(found).step >= max(1, first_step):
        begins = "from the start" if resume_from is None else f"at step {first_step}, from {resume_from}"
        raise ConfigError(
            f"this run would begin {begins}, but {found} is there from another: give another --output, or delete "
            "the checkpoints of later steps"
        )
