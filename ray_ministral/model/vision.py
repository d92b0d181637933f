"""Vision tower and projector: Hugging Face's modules, run over groups of images of one size.

Hugging Face joins the patches of all images into one sequence under a dense mask, so memory grows with the square of
the batch. Images of one size form a batch instead; there is nothing to mask, the numbers are equal and the cost linear.
Legend: N images of one size, P patches of one image, C channels of the tower, H hidden size of the decoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ray_ministral.model.attention import attention_of_equals
from ray_ministral.model.matmul import PackedWeight, give_back, take_over
from ray_ministral.model.packed_block import PackedBlock
from ray_ministral.model.rope import RotaryTables

if TYPE_CHECKING:
    from transformers import Mistral3Config

MAX_PATCHES_PER_BATCH = 32_768
"""Bounds the activations of one pass through the tower, whatever the microbatch holds."""


def build_vision(config: Mistral3Config) -> tuple[nn.Module, nn.Module]:
    """Hugging Face's `PixtralVisionModel` and `Mistral3MultiModalProjector`, on the current default device."""
    from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector
    from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel

    vision_config: Any = copy.deepcopy(config.vision_config)
    vision_config._attn_implementation = "sdpa"
    return PixtralVisionModel(vision_config), Mistral3MultiModalProjector(config)


def rotary_embedding(config: Mistral3Config) -> nn.Module:
    """The tower's position embedding, whose frequencies are a buffer that no checkpoint holds (kept in fp32)."""
    from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding

    vision_config: Any = config.vision_config
    return PixtralVisionRotaryEmbedding(vision_config)


def unpad(
    pixel_values: Tensor | Sequence[Tensor], image_sizes: Tensor | Sequence[Sequence[int]] | None
) -> list[Tensor]:
    """Images `[3, height, width]` out of a batch padded to the largest; `image_sizes` (height, width) of each."""
    images = list(pixel_values)
    if image_sizes is None:
        return images
    sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
    return [image[:, :height, :width] for image, (height, width) in zip(images, sizes, strict=True)]


def encode_images(
    tower: Any,
    projector: Any,
    images: Sequence[Tensor],
    *,
    feature_layer: int,
    max_patches: int = MAX_PATCHES_PER_BATCH,
) -> list[Tensor]:
    """Features `[tokens, H]` of each image (float `[3, height, width]`, any mix of sizes), in the order given."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault((image.shape[-2], image.shape[-1]), []).append(index)
    features: list[Tensor | None] = [None] * len(images)
    for (height, width), indices in by_size.items():
        patches = (height // tower.patch_size) * (width // tower.patch_size)
        step = max(1, max_patches // patches)
        for start in range(0, len(indices), step):
            some = indices[start : start + step]
            pixels_NCHW = torch.stack([images[i] for i in some])
            encoded_NPC = _run_tower(tower, pixels_NCHW, feature_layer)
            projected = projector(encoded_NPC.flatten(0, 1), [(height, width)] * len(some))
            for index, feature in zip(some, projected.chunk(len(some)), strict=True):
                features[index] = feature
    return [feature for feature in features if feature is not None]


def _run_tower(tower: Any, pixels_NCHW: Tensor, feature_layer: int) -> Tensor:
    """Hidden states `[N, P, C]` after the layer that `vision_feature_layer` names, as Hugging Face counts them."""
    embedded_NChw = tower.patch_conv(pixels_NCHW.to(tower.patch_conv.weight.dtype))
    rows, columns = embedded_NChw.shape[-2:]
    hidden_NPC: Tensor = tower.ln_pre(embedded_NChw.flatten(2).transpose(1, 2))
    positions_P2 = torch.cartesian_prod(
        torch.arange(rows, device=hidden_NPC.device), torch.arange(columns, device=hidden_NPC.device)
    )
    position_embeddings = tower.patch_positional_embedding(hidden_NPC, positions_P2)
    layers = tower.transformer.layers
    used = feature_layer if feature_layer >= 0 else len(layers) + 1 + feature_layer
    for layer in layers[:used]:
        hidden_NPC = layer(hidden_NPC, None, position_embeddings=position_embeddings)
    return hidden_NPC


def pack(tower: Any, projector: Any) -> None:
    """Lay the weights out for inference on CPU; what they were made of is given back."""
    positions = tower.patch_positional_embedding
    positions.forward = _PackedPositions(positions.forward)
    for layer in tower.transformer.layers:
        layer.forward = _PackedLayer(layer)
    for linear in (projector.patch_merger.merging_layer, projector.linear_1, projector.linear_2):
        linear.forward = take_over(linear)


class _PackedPositions:
    """Stands for the forward of the tower's position embedding: tables for the stream of all images' patches."""

    def __init__(self, forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._forward = forward

    def __call__(self, hidden_NPC: Tensor, positions_P2: Tensor) -> RotaryTables:
        images, patches, _ = hidden_NPC.shape
        tables = self._forward(hidden_NPC, positions_P2)
        cos_TD, sin_TD = (table.view(patches, -1).repeat(images, 1) for table in tables)
        return RotaryTables(cos_TD, sin_TD)


class _PackedLayer:
    """Stands for the forward of one of the tower's layers, whose matrices it takes over in a layout of its own."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.attention, layer.feed_forward
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        query_key_value = PackedWeight(torch.cat([linear.weight for linear in inputs]))
        give_back(*inputs)
        heads = attention.num_heads
        norms = (layer.attention_norm, layer.ffn_norm)
        self._block = PackedBlock(
            norms=((norms[0].weight, norms[0].variance_epsilon), (norms[1].weight, norms[1].variance_epsilon)),
            query_key_value=query_key_value,
            out=take_over(attention.o_proj),
            gate=take_over(mlp.gate_proj),
            up=take_over(mlp.up_proj),
            down=take_over(mlp.down_proj),
            activation=mlp.act_fn,
            heads=heads,
            kv_heads=heads,
        )

    def __call__(self, hidden_NPC: Tensor, _mask: None, *, position_embeddings: RotaryTables) -> Tensor:
        attend = partial(attention_of_equals, count=hidden_NPC.shape[0], is_causal=False)
        return self._block(hidden_NPC.flatten(0, 1), position_embeddings, attend).view_as(hidden_NPC)
