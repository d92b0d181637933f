"""The directory of a trained model: what to add to the weights that the stages have written.

A Hugging Face directory that `from_pretrained` and captioning open, or under LoRA one that `peft` opens.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ray_ministral.training.files import write_json

if TYPE_CHECKING:
    from transformers import Mistral3Config

    from ray_ministral.training.lora import LoraOptions

COMPANIONS = (".json", ".jinja", ".model", ".txt")
"""Suffixes of the files beside the weights that tokenizers, processors, templates and generation settings have."""
NOT_COMPANIONS = frozenset({"config.json", "adapter_config.json", "params.json"})
"""They describe weights: ours are made anew; `params.json` belongs to Mistral's own format, of which there are none."""

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def copy_companions(source: str | os.PathLike[str], folder: Path) -> None:
    """Copy what is not weights from the model directory that training began with."""
    for entry in sorted(Path(source).iterdir()):
        wanted = entry.suffix in COMPANIONS and entry.name not in NOT_COMPANIONS
        if wanted and not entry.name.endswith(".index.json") and entry.is_file():
            shutil.copyfile(entry, folder / entry.name)


def finish_model(
    folder: Path, weight_map: Mapping[str, str], config: Mistral3Config, source: str | os.PathLike[str]
) -> None:
    """When all chunks' files are in `folder`: index, config.json and companions. `weight_map`: tensor to file."""
    from ray_ministral.model.weights import finish_save

    finish_save(config, folder, dict(weight_map))
    copy_companions(source, folder)


def finish_adapter(
    folder: Path, weight_map: Mapping[str, str], options: LoraOptions, source: str | os.PathLike[str]
) -> None:
    """When all chunks' adapters are in `folder`: `peft`'s one file in place of them, its config, and companions."""
    from safetensors.torch import load_file, save_file

    from ray_ministral.training.lora import adapter_config

    names = sorted(set(weight_map.values()))
    tensors = {key: tensor for name in names for key, tensor in load_file(folder / name).items()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    for name in names:
        os.remove(folder / name)
    write_json(folder / ADAPTER_CONFIG, adapter_config(options, source))
    copy_companions(source, folder)
