"""The forward pass of a decoder layer, written out over the modules of Megatron's layer, and over packed weights.

Megatron's own goes through regions of tensor parallelism, an autograd function for each linear layer, hooks and
recomputation that are not used here: with few tokens, as in decoding, a tenth of the time. The numbers are the same.
Legend: T tokens, H hidden size, G KV heads, D head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ray_ministral.model.low_rank import multiply
from ray_ministral.model.matmul import PackedWeight, give_back, take_over
from ray_ministral.model.packed_block import PackedBlock
from ray_ministral.model.swiglu import swiglu


class DecoderLayer:
    """Stands for the forward of one of Megatron's layers: no bias, no dropout, RMS norms before."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        attention = layer.self_attention
        self._groups = attention.num_query_groups_per_partition
        self._heads_per_group = attention.num_attention_heads_per_partition // self._groups
        self._dim = attention.hidden_size_per_attention_head

    def __call__(self, hidden_states: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any) -> tuple[Tensor, None]:
        """Hidden states `[T, 1, H]`, and no context; takes Megatron's other arguments.

        Without the dimension of one, whose stride may be anything: torch would take a product over it for a batch.
        """
        layer = self._layer
        hidden_TH = hidden_states.squeeze(1)
        hidden_TH = hidden_TH + self._attention(layer.input_layernorm(hidden_TH), packed_seq_params)
        gate_up = multiply(layer.mlp.linear_fc1, layer.pre_mlp_layernorm(hidden_TH))
        hidden_TH = hidden_TH + multiply(layer.mlp.linear_fc2, swiglu(gate_up))
        return hidden_TH.unsqueeze(1), None

    def _attention(self, normed_TH: Tensor, params: Any) -> Tensor:
        attention = self._layer.self_attention
        mixed = multiply(attention.linear_qkv, normed_TH)
        mixed_TGXD = mixed.view(mixed.shape[0], self._groups, self._heads_per_group + 2, self._dim)
        query_TGXD, key_TG1D, value_TG1D = mixed_TGXD.split([self._heads_per_group, 1, 1], dim=2)
        out_TX = attention.core_attention(
            query_TGXD.flatten(1, 2), key_TG1D.squeeze(2), value_TG1D.squeeze(2), packed_seq_params=params
        )
        return multiply(attention.linear_proj, out_TX)


class PackedDecoderLayer:
    """Stands for the forward of one of Megatron's layers, whose weights it takes over in a layout of its own.

    For inference on CPU alone. The layer is left with its norms.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        groups, dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        mixed = attention.linear_qkv.weight.unflatten(0, (groups, -1, dim))
        heads_per_group = mixed.shape[1] - 2
        parts = mixed.split([heads_per_group, 1, 1], dim=1)
        query_key_value = PackedWeight(torch.cat([part.flatten(0, 2) for part in parts]))
        gate, up = map(PackedWeight, mlp.linear_fc1.weight.chunk(2))
        del mixed, parts
        give_back(attention.linear_qkv, mlp.linear_fc1)
        norms = (layer.input_layernorm, layer.pre_mlp_layernorm)
        self._block = PackedBlock(
            norms=((norms[0].weight, norms[0].eps), (norms[1].weight, norms[1].eps)),
            query_key_value=query_key_value,
            out=take_over(attention.linear_proj),
            gate=gate,
            up=up,
            down=take_over(mlp.linear_fc2),
            activation=partial(silu, inplace=True),
            heads=groups * heads_per_group,
            kv_heads=groups,
        )
        self._index = attention.core_attention.layer

    def __call__(self, hidden_states: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any) -> tuple[Tensor, None]:
        """As `DecoderLayer`'s."""
        attend = partial(packed_seq_params.context.attend, self._index)
        return self._block(hidden_states.squeeze(1), packed_seq_params.rotary, attend).unsqueeze(1), None
