"""The decoder chunk, built from Megatron-core. With `attention`, the only place that knows megatron's API.

It is `GPTModel` from the local layer spec with our own core attention; RoPE happens there, so
Megatron's own position embedding is off. Groups of one process each stand for tensor and context parallelism.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.distributed.distributed_c10d import ProcessGroupGloo

from ray_ministral.config import StageSpec
from ray_ministral.model.architecture import Architecture
from ray_ministral.model.attention import PackedAttention, PackedAttentionParams
from ray_ministral.model.layer import DecoderLayer, PackedDecoderLayer
from ray_ministral.model.low_rank import linear_layers, multiply, plain_product, use_product
from ray_ministral.model.matmul import PackedWeight, take_over
from ray_ministral.model.megatron_core import (
    GPTModel,
    ProcessGroupCollection,
    TransformerConfig,
    get_gpt_layer_local_spec,
    quietly,
)

if TYPE_CHECKING:
    from transformers import Mistral3Config


GROUP_TIMEOUT = timedelta(minutes=1)

LARGEST_OUTPUT_LAYER = 256 << 20
"""Bytes; a larger one is not packed: it would be there twice meanwhile, and products with so much work gain little."""


def transformer_config(config: Mistral3Config, stage: StageSpec, dtype: torch.dtype) -> Any:
    """Megatron's config of the chunk `stage`, with every fusion and CUDA path off."""
    text: Any = config.text_config
    return TransformerConfig(
        num_layers=len(stage.layers),
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def build_language_model(
    config: Mistral3Config, stage: StageSpec, dtype: torch.dtype, device: torch.device, *, share_output_layer: bool
) -> Any:
    """A `GPTModel` with the layers of `stage`; parameters are allocated on `device` and not initialised.

    `share_output_layer`: a chunk that has both ends of a tied model uses its embedding as its output layer.
    """
    arch = Architecture.from_config(config)
    with torch.device(device), quietly():
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.self_attention.submodules.core_attention = PackedAttention
        model = GPTModel(
            config=transformer_config(config, stage, dtype),
            transformer_layer_spec=spec,
            vocab_size=arch.vocab_size,
            max_sequence_length=arch.max_positions,
            pre_process=stage.is_first,
            post_process=stage.is_last,
            parallel_output=False,
            share_embeddings_and_output_weights=(
                share_output_layer and arch.tied_embeddings and stage.is_first and stage.is_last
            ),
            position_embedding_type="none",
            pg_collection=groups_of_one(),
        )
    for linear in linear_layers(model):
        use_product(linear, plain_product)
    for layer in model.decoder.layers:
        layer.forward = DecoderLayer(layer)
    return model.to(dtype)


def pack(model: Any) -> None:
    """Lay out the weights of a chunk without adapters for inference on CPU; what they were made of is given back."""
    for layer in model.decoder.layers:
        layer.forward = PackedDecoderLayer(layer)
    if not model.post_process:
        return
    shared = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if shared else model.output_layer.weight
    if weight.nbytes > LARGEST_OUTPUT_LAYER:
        return
    packed = PackedWeight(weight) if shared else take_over(model.output_layer)
    use_product(model.output_layer, lambda given, _weight: packed(given))


@cache
def groups_of_one() -> Any:
    """Megatron wants process groups even where there is no parallelism: gloo groups of this process alone.

    It also wants torch.distributed to have a default group, or it forgets the groups that it was given. Where nobody
    has made one, it is a group of one, too, bound to the loopback interface.
    """
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    store: Any = getattr(distributed, "HashStore")  # noqa: B009  # in torch, not in its stubs
    try:
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", store=store(), rank=0, world_size=1)
        group = ProcessGroupGloo(store(), 0, 1, GROUP_TIMEOUT)
    finally:
        if before is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = before
    return ProcessGroupCollection(tp=group, cp=group, pp=group, embd=group)


def embed(model: Any, token_ids_T: torch.Tensor) -> torch.Tensor:
    """Embeddings `[T, 1, H]` of a packed stream of token ids."""
    embedded: torch.Tensor = model.embedding(input_ids=token_ids_T.unsqueeze(0), position_ids=None)
    return embedded


def run_layers(model: Any, hidden_T1H: torch.Tensor | None, params: PackedAttentionParams) -> torch.Tensor:
    """The chunk's decoder layers (and the final norm on a last chunk): `[T, 1, H]`.

    `hidden_T1H` None takes what `set_input_tensor` was given, once: a tensor is not used for two batches.
    """
    given, model.decoder.input_tensor = model.decoder.input_tensor, None
    if hidden_T1H is None:
        tokens = params.rotary.cos_TD.shape[0] if params.rotary is not None else 0
        wanted = (tokens, 1, model.config.hidden_size)
        if given is None or tuple(given.shape) != wanted:
            raise ValueError(
                f"this stage got hidden states of shape {None if given is None else tuple(given.shape)}, wanted "
                f"{list(wanted)}: call set_input_tensor with the output of the stage before"
            )
        model.decoder.input_tensor = given
    try:
        output: torch.Tensor = model.decoder(hidden_states=hidden_T1H, attention_mask=None, packed_seq_params=params)
    finally:
        model.decoder.input_tensor = None
    return output


def logits(model: Any, hidden_T1H: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Logits `[rows, V]` of a last chunk, for all tokens or the given `rows` of the stream."""
    if rows is not None:
        hidden_T1H = hidden_T1H[rows]
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    return multiply(model.output_layer, hidden_T1H, weight).squeeze(1)
