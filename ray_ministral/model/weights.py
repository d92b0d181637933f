"""Weights between Hugging Face names and a chunk's parameters, both ways, a tensor at a time.

Megatron fuses query, key and value per query group, and gate with up. A `TensorSlot` says which part of which
parameter a Hugging Face tensor is; the same slots serve loading, saving and reading gradients by name.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ray_ministral.config import StageSpec
from ray_ministral.errors import ModelError
from ray_ministral.model.architecture import is_tied, load_config
from ray_ministral.model.checkpoint import (
    EMBEDDING,
    INDEX_FILE,
    OUTPUT_LAYER,
    Checkpoint,
    StoredTensor,
    hub_name,
)
from ray_ministral.model.low_rank import adapter_names, adapters_of
from ray_ministral.model.ministral3 import Ministral3Model

if TYPE_CHECKING:
    from transformers import Mistral3Config

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""By safetensors' names: what `Checkpoint.check` lets pass."""

DEQUANTIZE_ROWS = 4096
"""Rows of an fp8 tensor that are held in fp32 at a time."""


@dataclass(frozen=True)
class TensorSlot:
    """Where a Hugging Face tensor lives: rows `start` to `stop` of each of `groups` equal blocks of a parameter.

    A tensor that is a whole parameter has one group and all its rows.
    """

    parameter: nn.Parameter
    start: int
    stop: int
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor."""
        return (self.groups * (self.stop - self.start), *self.parameter.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in the chunk."""
        return math.prod(self.shape) * self.parameter.element_size()

    def region(self, values: Tensor) -> Tensor:
        """The slot's part `[groups, rows, …]`, a view, of a tensor shaped as the parameter, such as its gradient."""
        blocks: Tensor = values.unflatten(0, (self.groups, -1))
        return blocks[:, self.start : self.stop]

    def read(self, values: Tensor) -> Tensor:
        """The Hugging Face tensor out of a tensor shaped as the parameter."""
        return self.region(values).flatten(0, 1)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Set the slot's part of `values`, shaped as the parameter, from a Hugging Face tensor of any float dtype."""
        self.region(values).copy_(self.blocks(tensor))

    def blocks(self, tensor: Tensor) -> Tensor:
        """A Hugging Face tensor laid out as its `region` is: `[groups, rows, …]`, a view."""
        blocks: Tensor = tensor.unflatten(0, (self.groups, -1))
        return blocks

    def write(self, tensor: Tensor) -> None:
        """Set the parameter's part from a Hugging Face tensor of any float dtype and device."""
        self.put(tensor, self.parameter.data)


def tensor_slots(model: Ministral3Model) -> dict[str, TensorSlot]:
    """Every parameter of a chunk by its global Hugging Face name.

    The output layer of a tied model that is cut has a copy of the embedding, under its own name `lm_head.weight`.
    """
    slots: dict[str, TensorSlot] = {}

    def whole(name: str, parameter: nn.Parameter) -> None:
        slots[name] = TensorSlot(parameter, 0, parameter.shape[0])

    if model.pre_process:
        for part in ("vision_tower", "multi_modal_projector"):
            for name, parameter in getattr(model, part).named_parameters():
                whole(f"model.{part}.{name}", parameter)
        whole(EMBEDDING, model.language_model.embedding.word_embeddings.weight)

    text: Any = model.hf_config.text_config
    groups, dim = text.num_key_value_heads, text.head_dim
    query_rows = text.num_attention_heads // groups * dim
    for index, layer in zip(model.stage.layers, model.language_model.decoder.layers, strict=True):
        prefix = f"model.language_model.layers.{index}"
        attention, mlp = layer.self_attention, layer.mlp
        qkv = attention.linear_qkv.weight
        whole(f"{prefix}.input_layernorm.weight", layer.input_layernorm.weight)
        slots[f"{prefix}.self_attn.q_proj.weight"] = TensorSlot(qkv, 0, query_rows, groups)
        slots[f"{prefix}.self_attn.k_proj.weight"] = TensorSlot(qkv, query_rows, query_rows + dim, groups)
        slots[f"{prefix}.self_attn.v_proj.weight"] = TensorSlot(qkv, query_rows + dim, query_rows + 2 * dim, groups)
        whole(f"{prefix}.self_attn.o_proj.weight", attention.linear_proj.weight)
        whole(f"{prefix}.post_attention_layernorm.weight", layer.pre_mlp_layernorm.weight)
        gate_up, ffn = mlp.linear_fc1.weight, text.intermediate_size
        slots[f"{prefix}.mlp.gate_proj.weight"] = TensorSlot(gate_up, 0, ffn)
        slots[f"{prefix}.mlp.up_proj.weight"] = TensorSlot(gate_up, ffn, 2 * ffn)
        whole(f"{prefix}.mlp.down_proj.weight", mlp.linear_fc2.weight)

    if model.post_process:
        whole("model.language_model.norm.weight", model.language_model.decoder.final_layernorm.weight)
        if not model.share_embeddings_and_output_weights:
            whole(OUTPUT_LAYER, model.language_model.output_layer.weight)
    return slots


def all_slots(model: Ministral3Model) -> dict[str, TensorSlot]:
    """`tensor_slots`, and a chunk's low-rank adapters under the names that `peft` gives them in a file."""
    slots = tensor_slots(model)
    for layer in adapters_of(model):
        for index, (projection, b) in enumerate(zip(layer.names, layer.b, strict=True)):
            name_a, name_b = adapter_names(projection)
            slots[name_a] = TensorSlot(layer.a, index * layer.rank, (index + 1) * layer.rank)
            slots[name_b] = TensorSlot(b, 0, b.shape[0])
    return slots


def load_chunk(
    model_dir: str | os.PathLike[str],
    stage: StageSpec | None = None,
    *,
    vp_stage: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    share_output_layer: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Ministral3Model:
    """A chunk with its weights, of which only its own are read.

    `on_progress(done, total)` is told the bytes of the chunk's own tensors after each. Peak memory is the chunk
    itself plus one tensor at most, the largest first: bytes are read straight into the parameters where they fit.
    """
    config = load_config(model_dir)
    checkpoint = Checkpoint.open(model_dir)
    checkpoint.check(config)
    config = as_stored(config, checkpoint)
    pre_process, post_process = (True, True) if stage is None else (stage.is_first, stage.is_last)
    model = Ministral3Model(
        config,
        pre_process,
        post_process,
        vp_stage,
        stage=stage,
        dtype=dtype,
        device=device,
        initialize=False,
        share_output_layer=share_output_layer,
    )
    tied = is_tied(config)
    sources = [
        (checkpoint.tensors[EMBEDDING if tied and name == OUTPUT_LAYER else name], name, slot)
        for name, slot in tensor_slots(model).items()
    ]
    sources.sort(key=lambda source: -source[2].nbytes)
    sizes = [slot.nbytes for _, _, slot in sources]
    total, done = sum(sizes), 0
    for (stored, name, slot), size in zip(sources, sizes, strict=True):
        scale_name = EMBEDDING if stored is checkpoint.tensors.get(EMBEDDING) else name
        _load_tensor(stored, checkpoint.scales.get(scale_name), slot)
        done += size
        if on_progress is not None:
            on_progress(done, total)
    return model


def as_stored(config: Mistral3Config, checkpoint: Checkpoint) -> Mistral3Config:
    """The config with `tie_word_embeddings` as the checkpoint has it: tied exactly if it has no output layer."""
    config = copy.deepcopy(config)
    tied = not checkpoint.has_output_layer
    config.tie_word_embeddings = tied
    config.text_config.tie_word_embeddings = tied  # type: ignore[union-attr]
    return config


def _load_tensor(stored: StoredTensor, scale: StoredTensor | None, slot: TensorSlot) -> None:
    """Straight into the parameter where it is stored as it is held, else through a tensor of its own."""
    held = slot.parameter.data
    dtype = DTYPES[stored.dtype]
    if held.device.type == "cpu" and held.dtype == dtype and slot.groups == 1:
        _read_into(stored, held[slot.start : slot.stop])
        return
    tensor = torch.empty(stored.shape, dtype=dtype)
    _read_into(stored, tensor)
    if dtype != torch.float8_e4m3fn:
        slot.write(tensor)
        return
    assert scale is not None, "Checkpoint.check refuses fp8 tensors without a scale"
    factor = torch.empty(scale.shape, dtype=DTYPES[scale.dtype])
    _read_into(scale, factor)
    region, source = slot.region(held), tensor.unflatten(0, (slot.groups, -1))
    for group in range(slot.groups):
        for start in range(0, source.shape[1], DEQUANTIZE_ROWS):
            rows = slice(start, start + DEQUANTIZE_ROWS)
            region[group, rows].copy_(source[group, rows].float() * factor.float())


def _read_into(stored: StoredTensor, tensor: Tensor) -> None:
    """Fill a contiguous CPU tensor of the stored dtype and size from the file."""
    bytes_of: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    memory = memoryview(bytes_of)
    assert len(memory) == stored.nbytes, "Checkpoint.check compares shapes"
    with open(stored.path, "rb", buffering=0) as file:
        file.seek(stored.begin)
        done = 0
        while done < stored.nbytes:
            count = file.readinto(memory[done:])
            if not count:
                raise ModelError(
                    f"{stored.path!r} ended in the middle of {stored.name!r}: it has changed while it was read"
                )
            done += count


def read_tensors(
    model: Ministral3Model, values: Callable[[nn.Parameter], Tensor | None]
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors by name of what `values` gives for each parameter: data, gradient; None is left out."""
    for name, slot in tensor_slots(model).items():
        held = values(slot.parameter)
        if held is not None:
            yield name, slot.read(held)


def stored_tensors(model: Ministral3Model) -> dict[str, Tensor]:
    """What a chunk's file holds, by the names on the hub: views of the weights, but copies of what is fused."""
    tied = is_tied(model.hf_config)
    return {
        hub_name(name): tensor.detach()
        for name, tensor in read_tensors(model, lambda parameter: parameter.data)
        if not (tied and name == OUTPUT_LAYER)
    }


def weight_file_name(part: int, parts: int) -> str:
    """Name of a chunk's file among those of all chunks."""
    return f"model-{part + 1:05d}-of-{parts:05d}.safetensors"


def save_chunk(model: Ministral3Model, directory: str | os.PathLike[str], part: int, parts: int) -> dict[str, str]:
    """Write a chunk's weights as one safetensors file; returns its entries of the index (tensor name to file name).

    When all chunks are written, `finish_save` makes the directory one that `from_pretrained` opens.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.to("cpu").contiguous() for name, tensor in stored_tensors(model).items()}
    file_name = weight_file_name(part, parts)
    os.makedirs(directory, exist_ok=True)
    save_file(tensors, os.path.join(directory, file_name), metadata={"format": "pt"})
    return dict.fromkeys(tensors, file_name)


def finish_save(config: Mistral3Config, directory: str | os.PathLike[str], weight_map: dict[str, str]) -> None:
    """Write the index over all chunks' files, and config.json.

    The config does not say any more how the weights came: no quantisation, which was undone on loading, and the dtype
    that they have now (`from_pretrained` would cast them to the one of old).
    """
    total = 0
    for file_name in set(weight_map.values()):
        total += os.path.getsize(os.path.join(directory, file_name))
    with open(os.path.join(directory, INDEX_FILE), "w", encoding="utf-8") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, file, indent=2)
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = DTYPES[Checkpoint.open(directory).tensors[EMBEDDING].dtype]  # `from_pretrained` casts to what it says
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype  # type: ignore[union-attr]
    config.architectures = ["Mistral3ForConditionalGeneration"]
    config.save_pretrained(directory)


def parameter_slots(model: Ministral3Model) -> dict[nn.Parameter, dict[str, TensorSlot]]:
    """Every parameter of a chunk, adapters included, with the slots that it consists of.

    The name of the first slot is the parameter's own where it needs one.
    """
    parameters: dict[nn.Parameter, dict[str, TensorSlot]] = {}
    for name, slot in all_slots(model).items():
        parameters.setdefault(slot.parameter, {})[name] = slot
    return parameters
