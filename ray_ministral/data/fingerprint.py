"""What makes a job the job that it is: everything that decides what its output says, and nothing else.

In it: the model (configuration, weights, tokenizer, chat template, image processor), prompt, sampling, image limits,
the input files with their sizes, how they are cut into parts, and the columns of the output.

Not in it: stages, replicas, threads, micro-batches, address, error limits and retries, which may change from one run
to the next; nor device and dtype: the same captions are wanted on whatever the cluster has today, though the last
bits of a logit, and so now and then a caption, differ between them. Nor where the model directory lies.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray_ministral.config import CaptionConfig
from ray_ministral.data.shards import ShardPlan
from ray_ministral.errors import ModelError

FORMAT = 1
"""Grows when the same options come to mean another output."""

SAMPLE_BYTES = 1024
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library refuses more

_MODEL_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def fingerprint(config: CaptionConfig, plan: ShardPlan) -> dict[str, Any]:
    """The job's fingerprint, a plain JSON object. Reads the model directory; raises ModelError."""
    return {
        "format": FORMAT,
        "model": model_identity(config.model),
        "prompt": {
            "image_column": config.prompt.image_column,
            "template": config.prompt.template,
            "prompt_column": config.prompt.prompt_column,
            "system_prompt": config.prompt.system_prompt,
        },
        "sampling": {**asdict(config.sampling), "stop": list(config.sampling.stop)},
        "images": {name: value for name, value in asdict(config.images).items() if name != "deadline_s"},
        "inputs": {
            file.name: {"bytes": file.size, "row_groups": digest_of(file.row_group_rows)[:16]} for file in plan.files
        },
        "rows_per_shard": config.rows_per_shard,
        "limit": config.limit,
        "columns": list(plan.carried_columns),
        "with_token_ids": config.with_token_ids,
    }


def model_identity(model_dir: str | Path) -> dict[str, str]:
    """A digest each of a model's configuration, weights, tokenizer and image processor.

    For the weights: names, types and shapes of all tensors and a kilobyte out of each, which tells apart checkpoints
    of one architecture without reading them whole. Raises ModelError where weights are missing or not safetensors.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise ModelError(f"{model_dir} is not a directory: give --model a Hugging Face model directory")
    return {
        "config": _digest_files(folder, _MODEL_FILES),
        "weights": _digest_weights(folder),
        "tokenizer": _digest_files(folder, _TOKENIZER_FILES),
        "processor": _digest_files(folder, _PROCESSOR_FILES),
    }


def digest_of(value: object) -> str:
    """SHA-256, in hex, of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_files(folder: Path, names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ModelError(f"{folder / name} cannot be read: {error}") from error
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _digest_weights(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no *.safetensors file: only safetensors weights are read")
    tensors: dict[str, str] = {}
    for path in files:
        tensors |= _digest_tensors(path)
    # by tensor and not by file, so that a checkpoint that is cut into other files is still the same model
    return hashlib.sha256("\n".join(f"{name} {tensors[name]}" for name in sorted(tensors)).encode()).hexdigest()


def _digest_tensors(path: Path) -> dict[str, str]:
    """For each tensor of a safetensors file a digest of its type, shape and a sample from its middle."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 0 < header_bytes <= min(_MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size - 8):
                raise ValueError(f"a header of {header_bytes} bytes")
            header = json.loads(file.read(header_bytes))
            tensors = {}
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                sample = min(SAMPLE_BYTES, end - begin)
                file.seek(8 + header_bytes + begin + (end - begin - sample) // 2)
                data = file.read(sample)
                if len(data) < sample:
                    raise ValueError(f"tensor {name} ends behind the file")
                shape = f"{entry['dtype']} {entry['shape']} ".encode()
                tensors[name] = hashlib.sha256(shape + data).hexdigest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a safetensors file ({error}): download the model again") from error
    return tensors
