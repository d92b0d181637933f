"""What a Hugging Face config says about the model, read once and checked.

`load_config` gives Hugging Face's own config object, or a `ModelError` that says what it got and what it wanted;
`Architecture` is the few numbers that partitioning, memory estimates and schedulers need, free of torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_ministral.errors import ModelError

if TYPE_CHECKING:
    from transformers import Mistral3Config

ROPE_TYPES = ("default", "yarn")


@dataclass(frozen=True)
class VisionArchitecture:
    """Pixtral vision tower. `patch_size` and `image_size` in pixels."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    patch_size: int
    merge_size: int
    image_size: int

    @property
    def merged_patch_size(self) -> int:
        """Side in pixels of the square that becomes one image token."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class Architecture:
    """The numbers of a Ministral 3 decoder and its vision tower."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    vision: VisionArchitecture

    @classmethod
    def from_config(cls, config: Mistral3Config) -> Architecture:
        """Read the numbers out of a config that `check_config` has passed."""
        text: Any = config.text_config
        vision: Any = config.vision_config
        return cls(
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            ffn_hidden_size=text.intermediate_size,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            tied_embeddings=is_tied(config),
            vision=VisionArchitecture(
                num_layers=vision.num_hidden_layers,
                hidden_size=vision.hidden_size,
                ffn_hidden_size=vision.intermediate_size,
                num_heads=vision.num_attention_heads,
                patch_size=vision.patch_size,
                merge_size=config.spatial_merge_size,
                image_size=vision.image_size,
            ),
        )

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; the output layer has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def vision_parameters(self) -> int:
        """Parameters of the vision tower and the projector."""
        v = self.vision
        layer = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.ffn_hidden_size + 2 * v.hidden_size
        tower = v.num_layers * layer + 3 * v.patch_size**2 * v.hidden_size + v.hidden_size
        merger = v.hidden_size**2 * v.merge_size**2
        return tower + v.hidden_size + merger + v.hidden_size * self.hidden_size + self.hidden_size**2

    @property
    def kv_elements_per_token_and_layer(self) -> int:
        """Elements that one token adds to the KV cache of one layer."""
        return 2 * self.num_kv_heads * self.head_dim


def is_tied(config: Mistral3Config) -> bool:
    """Whether input embedding and output layer are one tensor.

    Either flag counts: hub checkpoints of the 3B say it in `text_config`, transformers ties by the top level one. The
    checkpoint has the last word (`weights.Checkpoint.is_tied`): with an `lm_head.weight` of its own it is not tied.
    """
    return bool(config.tie_word_embeddings or getattr(config.text_config, "tie_word_embeddings", False))


def load_config(model_dir: str | os.PathLike[str]) -> Mistral3Config:
    """Read and check `config.json` of a Hugging Face model directory.

    Raises `ModelError` where the directory, the file or the architecture is not what can be run.
    """
    path = os.path.join(os.fspath(model_dir), "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            raw = json.load(file)
    except FileNotFoundError:
        raise ModelError(
            f"no config.json in {os.fspath(model_dir)!r}: give a Hugging Face model directory of Ministral 3"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path!r} as JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("model_type") != "mistral3":
        found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise ModelError(f"{path!r} has model_type {found!r}: only 'mistral3' (Ministral 3) can be run")
    text_type = (raw.get("text_config") or {}).get("model_type")
    vision_type = (raw.get("vision_config") or {}).get("model_type", "pixtral")
    if text_type != "ministral3":
        raise ModelError(f"{path!r} has text_config.model_type {text_type!r}: only 'ministral3' can be run")
    if vision_type != "pixtral":
        raise ModelError(f"{path!r} has vision_config.model_type {vision_type!r}: only 'pixtral' can be run")

    from transformers import Mistral3Config
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its remarks on YaRN factors are no news to anyone
    try:
        config = Mistral3Config.from_dict(raw)
    except Exception as error:  # transformers raises many types here, all about the file's content
        raise ModelError(f"{path!r} is not a valid Ministral 3 config: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    check_config(config)
    return config


def check_config(config: Mistral3Config) -> None:
    """Refuse, with a `ModelError`, what this package would run wrongly rather than not at all."""
    text: Any = config.text_config
    vision: Any = config.vision_config

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise ModelError(f"this model cannot be run: {what}")

    require(text.model_type == "ministral3", f"text_config.model_type is {text.model_type!r}, wanted 'ministral3'")
    require(vision.model_type == "pixtral", f"vision_config.model_type is {vision.model_type!r}, wanted 'pixtral'")
    require(
        text.sliding_window is None,
        f"text_config.sliding_window is {text.sliding_window}: sliding-window attention is not supported",
    )
    require(text.hidden_act == "silu", f"text_config.hidden_act is {text.hidden_act!r}, wanted 'silu'")
    require(
        not text.attention_dropout, f"text_config.attention_dropout is {text.attention_dropout}, wanted 0: set it to 0"
    )
    require(
        text.num_attention_heads % text.num_key_value_heads == 0,
        f"{text.num_attention_heads} attention heads are not a multiple of {text.num_key_value_heads} KV heads",
    )
    rope = text.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    require(rope_type in ROPE_TYPES, f"rope_type is {rope_type!r}, wanted one of {', '.join(ROPE_TYPES)}")
    require(
        rope.get("partial_rotary_factor", 1.0) == 1.0,
        f"partial_rotary_factor is {rope.get('partial_rotary_factor')}, wanted 1: rotation of whole heads",
    )
    if rope.get("llama_4_scaling_beta") is not None:
        require(
            bool(rope.get("original_max_position_embeddings")),
            "llama_4_scaling_beta is set without original_max_position_embeddings: add it to rope_parameters",
        )
    require(
        isinstance(config.vision_feature_layer, int),
        f"vision_feature_layer is {config.vision_feature_layer!r}, wanted one integer",
    )
    layers = vision.num_hidden_layers
    require(
        -layers - 1 <= config.vision_feature_layer <= layers,
        f"vision_feature_layer is {config.vision_feature_layer}, the vision tower has {layers} layers",
    )
    require(
        isinstance(vision.patch_size, int) and isinstance(vision.image_size, int),
        f"patch_size {vision.patch_size!r} and image_size {vision.image_size!r} must be integers (square)",
    )
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    require(
        quantization is None or method == "fp8",
        f"quantization_config.quant_method is {method!r}: only 'fp8' with per-tensor scales can be read",
    )
