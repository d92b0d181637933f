"""LoRA: adapters for the decoder's projections, in the format of `peft`, and merged into the weights on request.

Every attention and MLP projection of the decoder gets a pair A, B; everything else is frozen. File format as
`peft` 0.21 reads and writes it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ray_ministral.config import StageSpec
from ray_ministral.data.model_files import read_json
from ray_ministral.errors import ConfigError, ModelError
from ray_ministral.model.architecture import Architecture, load_config
from ray_ministral.model.checkpoint import EMBEDDING, Checkpoint
from ray_ministral.model.low_rank import LowRank, adapt, adapter_names, adapters_of, linear_layers
from ray_ministral.model.ministral3 import Ministral3Model
from ray_ministral.model.weights import TensorSlot, all_slots, as_stored, load_chunk, save_chunk, tensor_slots
from ray_ministral.training.files import TEMPORARY, put_in_place
from ray_ministral.training.model_directory import ADAPTER_CONFIG, ADAPTER_FILE, finish_model

TARGETS = r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
"""Whole names of the adapted modules; the vision tower has a `q_proj`, too, so the last part alone won't do."""

_UNTOUCHED: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "use_rslora": False,
    "lora_dropout": 0.0,
}
"""What else `peft` can do and we don't."""


@dataclass(frozen=True)
class LoraOptions:
    """`rank` of all adapters. What they add is scaled by `alpha / rank`; `alpha` None is the rank: a scale of one."""

    rank: int
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"--lora-rank must be at least 1, got {self.rank}: leave it out to train all weights")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ConfigError(f"the alpha of LoRA must be positive, got {self.alpha}")

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def add_adapters(model: Ministral3Model, options: LoraOptions, seed: int) -> None:
    """Freeze a chunk and give the projections of its decoder layers adapters. B is zero, so nothing changes yet.

    A is drawn as `peft` draws it (uniform up to 1 / sqrt(inputs)), from the seed and its own name: it is the same
    wherever the layer lives. Comes before `TrainStage` is made.
    """
    model.requires_grad_(False)
    projections: dict[nn.Parameter, list[tuple[str, TensorSlot]]] = {}
    for name, slot in tensor_slots(model).items():
        projections.setdefault(slot.parameter, []).append((name.removesuffix(".weight"), slot))
    for module in list(linear_layers(model.language_model.decoder)):
        names, slots = zip(*projections[module.weight], strict=True)
        rows = [slot.shape[0] for slot in slots]
        adapt(module, LowRank(names, rows, slots[0].groups, options.rank, options.scale, module.weight))
    slots_by_name = all_slots(model)
    for layer in adapters_of(model):
        for projection in layer.names:
            name = adapter_names(projection)[0]
            slots_by_name[name].write(_initial(slots_by_name[name].shape, seed, name))


def _initial(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    bound: float = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def adapter_config(options: LoraOptions, model_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """`adapter_config.json`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.abspath(model_dir),
        "inference_mode": True,
        "r": options.rank,
        "lora_alpha": options.rank if options.alpha is None else options.alpha,
        "target_modules": TARGETS,
        "init_lora_weights": True,
        **_UNTOUCHED,
    }


def adapter_tensors(model: Ministral3Model) -> dict[str, Tensor]:
    """A chunk's adapters by the names that `peft` gives them in a file; views."""
    slots = all_slots(model)
    return {
        name: slots[name].read(slots[name].parameter.detach())
        for layer in adapters_of(model)
        for projection in layer.names
        for name in adapter_names(projection)
    }


def read_options(adapter_dir: str | os.PathLike[str]) -> LoraOptions:
    """Rank and alpha of saved adapters. Raises `ModelError` for none, or for ones of another kind than ours."""
    folder = os.fspath(adapter_dir)
    config = read_json(folder, ADAPTER_CONFIG)
    if config is None:
        raise ModelError(f"{folder} has no {ADAPTER_CONFIG}: give a directory of LoRA adapters as peft saves them")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} holds adapters of type {config.get('peft_type')!r}: only LORA is known here")
    strange = [f"{key} {config[key]!r}" for key, value in _UNTOUCHED.items() if config.get(key, value) != value]
    strange = [text for text in strange if not text.startswith("lora_dropout ")]  # it has no part in the result
    if strange:
        raise ModelError(f"{folder}/{ADAPTER_CONFIG} has {', '.join(strange)}, which is not supported: merge with peft")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise ModelError(f"{folder}/{ADAPTER_CONFIG}: r and lora_alpha must be numbers, got {rank!r} and {alpha!r}")
    return LoraOptions(rank, float(alpha))


def load_adapters(model: Ministral3Model, adapter_dir: str | os.PathLike[str]) -> None:
    """Give a chunk the adapters of a directory, of which only its own are read. Raises `ModelError`."""
    from safetensors import SafetensorError, safe_open

    add_adapters(model, read_options(adapter_dir), seed=0)
    path, slots = os.path.join(adapter_dir, ADAPTER_FILE), all_slots(model)
    try:
        with safe_open(path, framework="pt") as file:
            for name in adapter_tensors(model):
                tensor = file.get_tensor(name)
                if tuple(tensor.shape) != slots[name].shape:
                    wanted = list(slots[name].shape)
                    raise ModelError(f"{path}: {name} is {list(tensor.shape)}, the model has room for {wanted}")
                slots[name].write(tensor)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"cannot read the adapters in {path}: {error}. Wanted A and B of every attention and MLP projection of "
            "the decoder, as --lora-rank trains them; merge others with peft"
        ) from error


def fold_in(model: Ministral3Model) -> None:
    """Add what the adapters do to the weights of the chunk: W + scale * B A, in fp32. Then take B to zero."""
    slots = all_slots(model)
    with torch.no_grad():
        for layer in adapters_of(model):
            for projection in layer.names:
                weight, a, b = (slots[name] for name in (f"{projection}.weight", *adapter_names(projection)))
                low, high = a.read(a.parameter).float(), b.read(b.parameter).float()
                weight.write(torch.addmm(weight.read(weight.parameter).float(), high, low, alpha=layer.scale))
                b.parameter.zero_()


def merge_adapters(
    model_dir: str | os.PathLike[str], adapter_dir: str | os.PathLike[str], output: str | os.PathLike[str]
) -> None:
    """Write the model of `model_dir` with the adapters merged in: a Hugging Face directory, in the model's dtype.

    Layer by layer: memory for the largest layer (or the first and last chunk's other weights) is enough. `output`
    must not exist; it appears when it is complete. Raises `ModelError`, `ConfigError`.
    """
    destination = Path(output)
    if destination.exists():
        raise ConfigError(f"{destination} is there already: give a new folder for the merged model")
    config = load_config(model_dir)
    checkpoint = Checkpoint.open(model_dir)
    config = as_stored(config, checkpoint)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[checkpoint.tensors[EMBEDDING].dtype]
    temporary = destination.with_name(f"{TEMPORARY}{destination.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    layers = Architecture.from_config(config).num_layers
    weight_map: dict[str, str] = {}
    try:
        for layer in range(layers):
            chunk = load_chunk(model_dir, StageSpec(layer, layer + 1, layer == 0, layer == layers - 1), dtype=dtype)
            load_adapters(chunk, adapter_dir)
            fold_in(chunk)
            weight_map |= save_chunk(chunk, temporary, layer, layers)
        finish_model(temporary, weight_map, config, model_dir)
        put_in_place(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
