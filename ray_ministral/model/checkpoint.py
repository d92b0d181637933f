"""The safetensors files of a Hugging Face model directory: which tensors are there, under one canonical name each.

Canonical are the parameter names of `Mistral3ForConditionalGeneration` (`model.language_model.layers.0.…`); hub
checkpoints use older ones (`language_model.model.layers.0.…`), which transformers still writes. Only headers are read
here, without torch; `weights` reads the tensors.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_ministral.errors import ModelError
from ray_ministral.model.architecture import Architecture

if TYPE_CHECKING:
    from transformers import Mistral3Config

EMBEDDING = "model.language_model.embed_tokens.weight"
OUTPUT_LAYER = "lm_head.weight"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_HUB_PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
_WEIGHT_SCALE = ".weight_scale_inv"
_ACTIVATION_SCALE = ".activation_scale"  # for fp8 arithmetic, which we don't do: weights alone are dequantised
_BUFFERS = re.compile(r"\.(inv_freq|original_inv_freq)$")
_FLOATS = {"F32", "F16", "BF16", "F8_E4M3"}


def canonical_name(stored: str) -> str:
    """The parameter name of `Mistral3ForConditionalGeneration` for a tensor's name in a file."""
    for prefix, replacement in _HUB_PREFIXES:
        if stored.startswith(prefix):
            return replacement + stored[len(prefix) :]
    return stored


def hub_name(canonical: str) -> str:
    """The name under which checkpoints on the hub, and transformers' own `save_pretrained`, store a parameter."""
    for prefix, replacement in _HUB_PREFIXES:
        if canonical.startswith(replacement):
            return prefix + canonical[len(replacement) :]
    return canonical


def expected_shapes(config: Mistral3Config) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the whole model by canonical name, the output layer included even if tied."""
    arch = Architecture.from_config(config)
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    query, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (arch.vocab_size, hidden), OUTPUT_LAYER: (arch.vocab_size, hidden)}
    for layer in range(arch.num_layers):
        prefix = f"model.language_model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (query, hidden)
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (kv, hidden)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (kv, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, query)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.language_model.norm.weight"] = (hidden,)

    vision = arch.vision
    width, patch = vision.hidden_size, vision.patch_size
    shapes["model.vision_tower.patch_conv.weight"] = (width, config.vision_config.num_channels, patch, patch)  # type: ignore[union-attr]
    shapes["model.vision_tower.ln_pre.weight"] = (width,)
    for layer in range(vision.num_layers):
        prefix = f"model.vision_tower.transformer.layers.{layer}"
        shapes[f"{prefix}.attention_norm.weight"] = (width,)
        shapes[f"{prefix}.ffn_norm.weight"] = (width,)
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.attention.{projection}.weight"] = (width, width)
        shapes[f"{prefix}.feed_forward.gate_proj.weight"] = (vision.ffn_hidden_size, width)
        shapes[f"{prefix}.feed_forward.up_proj.weight"] = (vision.ffn_hidden_size, width)
        shapes[f"{prefix}.feed_forward.down_proj.weight"] = (width, vision.ffn_hidden_size)
    projector = "model.multi_modal_projector"
    shapes[f"{projector}.norm.weight"] = (width,)
    shapes[f"{projector}.patch_merger.merging_layer.weight"] = (width, width * vision.merge_size**2)
    shapes[f"{projector}.linear_1.weight"] = (hidden, width)
    shapes[f"{projector}.linear_2.weight"] = (hidden, hidden)
    if config.multimodal_projector_bias:
        shapes[f"{projector}.linear_1.bias"] = (hidden,)
        shapes[f"{projector}.linear_2.bias"] = (hidden,)
    return shapes


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` from byte `begin` of the file on, row by row, little-endian.

    `dtype` as safetensors writes it (F32, BF16, F8_E4M3, …).
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` by canonical name; `scales`, the fp8 scale of a tensor by that tensor's canonical name."""

    model_dir: str
    tensors: dict[str, StoredTensor]
    scales: dict[str, StoredTensor]

    @classmethod
    def open(cls, model_dir: str | os.PathLike[str]) -> Checkpoint:
        """Read the headers. Raises `ModelError` where files are absent, broken or not safetensors."""
        directory = os.fspath(model_dir)
        tensors: dict[str, StoredTensor] = {}
        scales: dict[str, StoredTensor] = {}
        for path in _weight_files(directory):
            for stored in _read_header(path):
                name = canonical_name(stored.name)
                if _BUFFERS.search(name) or name.endswith(_ACTIVATION_SCALE):
                    continue
                if name.endswith(_WEIGHT_SCALE):
                    scales[name.removesuffix(_WEIGHT_SCALE) + ".weight"] = stored
                    continue
                if name in tensors:
                    raise ModelError(
                        f"tensor {name!r} is stored twice, in {tensors[name].path!r} as {tensors[name].name!r} and in "
                        f"{path!r} as {stored.name!r}: remove one of the files"
                    )
                tensors[name] = stored
        return cls(directory, tensors, scales)

    @property
    def has_output_layer(self) -> bool:
        """Whether the output layer has weights of its own."""
        return OUTPUT_LAYER in self.tensors

    def check(self, config: Mistral3Config) -> None:
        """Hold all tensors against the config; `ModelError` names what is missing, surplus or misshapen."""
        wanted = expected_shapes(config)
        if not self.has_output_layer:
            from ray_ministral.model.architecture import is_tied

            if not is_tied(config):
                raise ModelError(
                    f"{self.model_dir!r} has no {OUTPUT_LAYER!r} and its config.json does not tie the embeddings: "
                    'add the tensor, or set "tie_word_embeddings": true'
                )
            del wanted[OUTPUT_LAYER]
        missing = sorted(wanted.keys() - self.tensors.keys())
        surplus = sorted(self.tensors.keys() - wanted.keys())
        misshapen = [
            f"{name} is {list(self.tensors[name].shape)}, wanted {list(shape)}"
            for name, shape in wanted.items()
            if name in self.tensors and self.tensors[name].shape != shape
        ]
        foreign = [f"{name} is {stored.dtype}" for name, stored in self.tensors.items() if stored.dtype not in _FLOATS]
        fp8 = {name for name, stored in self.tensors.items() if stored.dtype == "F8_E4M3"}
        scaleless = sorted(fp8 - self.scales.keys())
        surplus += [self.scales[name].name for name in sorted(self.scales.keys() - fp8)]
        grids = [
            f"{scale.name} is {list(scale.shape)}" for scale in self.scales.values() if math.prod(scale.shape) != 1
        ]
        found = [
            f"{what}: {_some(names)}"
            for what, names in (
                ("missing tensors", missing),
                ("surplus tensors", surplus),
                ("tensors of another shape", misshapen),
                (f"tensors of a dtype that is not one of {', '.join(sorted(_FLOATS))}", foreign),
                ("fp8 tensors without weight_scale_inv", scaleless),
                ("fp8 scales that are not one number a tensor (convert to bf16 first)", grids),
            )
            if names
        ]
        if found:
            raise ModelError(
                f"the weights in {self.model_dir!r} do not fit its config.json; {'; '.join(found)}. "
                "Check that the download is complete and that config.json belongs to it"
            )


def _some(names: list[str], most: int = 4) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _weight_files(directory: str) -> list[str]:
    """The safetensors files of the model; as for transformers one whole file goes before an index. Never a pickle."""
    single = os.path.join(directory, SINGLE_FILE)
    if os.path.exists(single):
        return [single]
    index_path = os.path.join(directory, INDEX_FILE)
    if os.path.exists(index_path):
        try:
            with open(index_path, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"cannot read {index_path!r}: {type(error).__name__}: {error}") from error
        for name in names:
            if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
                raise ModelError(f"{index_path!r} names {name!r}: wanted the plain name of a .safetensors file")
        paths = [os.path.join(directory, name) for name in names]
        absent = [path for path in paths if not os.path.exists(path)]
        if absent:
            raise ModelError(f"{index_path!r} names files that are not there: {_some(absent)}. Complete the download")
        return paths
    others = [name for name in sorted(os.listdir(directory)) if name.endswith((".bin", ".pt", ".pth", ".safetensors"))]
    raise ModelError(
        f"neither {INDEX_FILE} nor {SINGLE_FILE} in {directory!r} (found {', '.join(others) or 'no weights'}): "
        "only safetensors of a Hugging Face model are read; convert other weights first"
    )


def _read_header(path: str) -> list[StoredTensor]:
    """The library checks that the file is whole and its tensors lie as they should; then its header says where."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read {path!r} as safetensors: {error}. Download it again") from error
    header.pop("__metadata__", None)
    return [
        StoredTensor(
            path=path,
            name=name,
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
            begin=8 + size + entry["data_offsets"][0],
            nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    ]
