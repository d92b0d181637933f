"""The small JSON files of a Hugging Face model directory, read without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray_ministral.errors import ModelError

# What Hugging Face's classes take where config.json is silent (it may leave out what equals the default):
# PixtralVisionConfig.patch_size, PixtralVisionConfig.image_size, Mistral3Config.spatial_merge_size.
DEFAULT_PATCH_SIZE = 16
DEFAULT_IMAGE_SIZE = 1024
DEFAULT_SPATIAL_MERGE_SIZE = 2


def read_json(model_dir: str | Path, name: str) -> dict[str, Any] | None:
    """The JSON object in `model_dir/name`, or None where there is no such file. Raises ModelError if it is not one."""
    path = Path(model_dir) / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}, wanted an object")
    return value


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """The model's config.json. Raises ModelError where the directory or the file is missing or not JSON."""
    if not Path(model_dir).is_dir():
        raise ModelError(f"{model_dir} is not a directory: give --model a Hugging Face model directory")
    config = read_json(model_dir, "config.json")
    if config is None:
        raise ModelError(f"{model_dir} has no config.json: give --model a Hugging Face model directory")
    return config


def merged_patch(config: dict[str, Any], model_dir: str | Path) -> int:
    """Pixels a side that become one image token: the vision tower's patch size times the spatial merge size.

    Raises ModelError where `config` (the model's config.json) says something else than positive whole numbers.
    """
    patch = _section(config, "vision_config", model_dir).get("patch_size", DEFAULT_PATCH_SIZE)
    merge = config.get("spatial_merge_size", DEFAULT_SPATIAL_MERGE_SIZE)
    for key, value in (("vision_config.patch_size", patch), ("spatial_merge_size", merge)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{model_dir}/config.json: {key} must be a positive whole number, got {value!r}")
    return int(patch) * int(merge)


def vision_image_size(config: dict[str, Any], model_dir: str | Path) -> Any:
    """The longest side in pixels that the vision tower was made for, as config.json has it."""
    return _section(config, "vision_config", model_dir).get("image_size", DEFAULT_IMAGE_SIZE)


def _section(config: dict[str, Any], key: str, model_dir: str | Path) -> dict[str, Any]:
    section = config.get(key)
    if not isinstance(section, dict):
        raise ModelError(f"{model_dir}/config.json has no {key}: it is not the configuration of a Mistral 3 model")
    return section
