"""Small random Mistral3 models, their directories, and inputs for them: what the rungs of the ladder share.

The Hugging Face model is the yardstick, so nothing here uses this package's own model code. fp32, CPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from tests.unit.model_directory import make_model_directory, make_tokenizer

MERGED_PATCH = 28
"""Pixels a side of one image token: patch 14, merge 2, as in `tests.unit.model_directory`."""

IMAGE_TOKEN, BREAK_TOKEN, END_TOKEN, PAD_TOKEN, EOS_TOKEN = 5, 6, 7, 11, 2
VOCABULARY = make_tokenizer().get_vocab_size()

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
"""Small enough that a short prompt leaves the trained positions; a large beta, so that a wrong scale shows."""

DEFAULT_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.3,
}


def small_config(
    *, tied: bool = False, layers: int = 4, rope: dict[str, Any] | None = None, **overrides: Any
) -> Mistral3Config:
    """A Ministral 3 config: hidden 64, 8 query heads, 2 KV heads of size 16 (so that heads x size is not hidden)."""
    with quiet_transformers():
        return Mistral3Config(
            text_config={
                "model_type": "ministral3",
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": layers,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "max_position_embeddings": 256,
                "rope_parameters": dict(rope or YARN),
                "tie_word_embeddings": tied,
                "eos_token_id": EOS_TOKEN,
                "pad_token_id": PAD_TOKEN,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "head_dim": 16,
                "patch_size": MERGED_PATCH // 2,
                "image_size": 140,
            },
            image_token_index=IMAGE_TOKEN,
            spatial_merge_size=2,
            tie_word_embeddings=tied,
            **overrides,
        )


def small_model(config: Mistral3Config, *, seed: int = 0, std: float = 0.05) -> Mistral3ForConditionalGeneration:
    """Hugging Face's model with random weights, norms too, in eval mode.

    `std` on weights of a model so narrow keeps hidden states and logits of different tokens well apart.
    """
    generator = torch.Generator().manual_seed(seed)
    with quiet_transformers():
        model = Mistral3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_pre" in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        # Attention must matter: queries and keys large enough that the softmax is far from flat.
        for layer in model.model.language_model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.mul_(5)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == config.tie_word_embeddings
    return model


def save_directory(model: Mistral3ForConditionalGeneration, folder: Path, **save_options: Any) -> Path:
    """A whole model directory: tokenizer, template and processor of the unit tests, config and weights of `model`."""
    make_model_directory(folder)
    (folder / "model.safetensors").unlink()
    with quiet_transformers():
        model.save_pretrained(folder, **save_options)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_TOKEN, "pad_token_id": PAD_TOKEN}))
    return folder


@contextmanager
def quiet_transformers() -> Any:
    """No remarks of transformers about YaRN factors and the like."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@dataclass(frozen=True)
class Row:
    """A prompt (int64 `[P]`, placeholders expanded) and its images (uint8 `[3, H, W]`)."""

    token_ids: torch.Tensor
    images: tuple[np.ndarray, ...] = ()

    @property
    def pixels(self) -> list[torch.Tensor]:
        """The images normalised, by a formula of the tests' own."""
        return [normalise(image) for image in self.images]


def normalise(image: np.ndarray) -> torch.Tensor:
    """uint8 `[3, H, W]` to float32 with the mean and std of CLIP, which Pixtral uses."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return (torch.from_numpy(image).float() / 255 - mean) / std


def make_row(generator: np.random.Generator, text: int, sizes: Sequence[tuple[int, int]] = ()) -> Row:
    """A row of `text` random text tokens, in random places among them images of `sizes`: (height, width) in tokens."""
    pieces: list[list[int]] = [[1, 3]]
    cuts = sorted(generator.integers(0, text + 1, len(sizes)).tolist())
    words = generator.integers(20, VOCABULARY, text).tolist()
    images, start = [], 0
    for (height, width), cut in zip(sizes, cuts, strict=True):
        grid = np.full((height, width + 1), IMAGE_TOKEN)
        grid[:, -1] = BREAK_TOKEN
        grid[-1, -1] = END_TOKEN
        pieces += [words[start:cut], grid.reshape(-1).tolist()]
        start = cut
        side = (3, height * MERGED_PATCH, width * MERGED_PATCH)
        images.append(generator.integers(0, 256, side, dtype=np.uint8))
    pieces += [words[start:], [4]]
    return Row(torch.tensor([token for piece in pieces for token in piece]), tuple(images))


def mixed_rows(seed: int = 0) -> list[Row]:
    """Rows of different lengths: no image, one, several of several sizes."""
    generator = np.random.default_rng(seed)
    shapes: list[tuple[int, list[tuple[int, int]]]] = [
        (9, [(2, 3)]),
        (17, []),
        (4, [(1, 1), (3, 2)]),
        (1, [(2, 2)]),
        (23, [(2, 3), (2, 3), (1, 4)]),
        (5, []),
    ]
    return [make_row(generator, text, sizes) for text, sizes in shapes]


@dataclass(frozen=True)
class Padded:
    """Rows as Hugging Face takes them. `arguments` go to either model's forward."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_sizes: torch.Tensor | None

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            **self.images,
        }

    @property
    def images(self) -> dict[str, Any]:
        """Nothing at all where there are none: Hugging Face's `generate` does not take None."""
        if self.pixel_values is None:
            return {}
        return {"pixel_values": self.pixel_values, "image_sizes": self.image_sizes}

    @property
    def labels(self) -> torch.Tensor:
        """Every token after the first of its row is to be predicted, except images and padding."""
        labels = self.input_ids.clone()
        labels[self.attention_mask == 0] = -100
        labels[self.input_ids == IMAGE_TOKEN] = -100
        first = self.attention_mask.argmax(1)
        labels[torch.arange(len(first)), first] = -100
        return labels


def pad_rows(rows: Sequence[Row], side: str = "right") -> Padded:
    """Pad token ids on `side`, and images to the largest; positions count from each row's first token."""
    length = max(len(row.token_ids) for row in rows)
    ids = torch.full((len(rows), length), PAD_TOKEN)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        count = len(row.token_ids)
        where = slice(0, count) if side == "right" else slice(length - count, length)
        ids[index, where] = row.token_ids
        mask[index, where] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    pixels, sizes = pad_images([image for row in rows for image in row.pixels])
    return Padded(ids, mask, positions, pixels, sizes)


def pad_images(images: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Images on one canvas size, filled with a value that would show if it were read."""
    if not images:
        return None, None
    sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = sizes.max(0).values.tolist()
    canvas = torch.full((len(images), 3, height, width), 7.0)
    for index, image in enumerate(images):
        canvas[index, :, : image.shape[1], : image.shape[2]] = image
    return canvas, sizes


def named_weights(model: Mistral3ForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Every parameter by name, a tied output layer once, as the embedding."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
