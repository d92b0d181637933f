"""A transformer block for inference on CPU, its weights packed: what decoder and vision tower have in common.

Root mean square norms before, no biases, rotary embeddings, a gated MLP.
Legend: T tokens, C hidden size, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import rms_norm

from ray_ministral.model.matmul import PackedWeight
from ray_ministral.model.rope import RotaryTables

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From rotated queries `[T, H, D]`, keys and values `[T, G, D]` to `[T, H, D]`."""

Norm = tuple[Tensor, float]
"""Weight and epsilon."""


class PackedBlock:
    """Called with hidden states `[T, C]`, gives the block's."""

    def __init__(
        self,
        *,
        norms: tuple[Norm, Norm],
        query_key_value: PackedWeight,
        out: PackedWeight,
        gate: PackedWeight,
        up: PackedWeight,
        down: PackedWeight,
        activation: Callable[[Tensor], Tensor],
        heads: int,
        kv_heads: int,
    ) -> None:
        """`norms` before attention and before the MLP. `activation` of the gate may write over what it is given."""
        self._norms = norms
        self._query_key_value, self._out = query_key_value, out
        self._gate, self._up, self._down = gate, up, down
        self._activation = activation
        self._heads, self._groups = heads, kv_heads

    def __call__(self, hidden_TC: Tensor, rotary: RotaryTables, attend: Attend) -> Tensor:
        """The queries are scaled by position where `rotary` says so."""
        heads, groups = self._heads, self._groups
        mixed = self._query_key_value(_normed(hidden_TC, self._norms[0]))
        mixed_TXD = mixed.unflatten(-1, (heads + 2 * groups, -1))
        rotated_TXD = rotary.rotate(mixed_TXD[:, : heads + groups])  # at once: on few tokens each call costs alike
        query_THD = rotary.scale_query(rotated_TXD[:, :heads])
        attended_THD = attend(query_THD, rotated_TXD[:, heads:], mixed_TXD[:, heads + groups :])
        hidden_TC = self._out(attended_THD.flatten(1)).add_(hidden_TC)
        normed_TC = _normed(hidden_TC, self._norms[1])
        gated = self._activation(self._gate(normed_TC)).mul_(self._up(normed_TC))
        return self._down(gated).add_(hidden_TC)


def _normed(x: Tensor, norm: Norm) -> Tensor:
    weight, epsilon = norm
    return rms_norm(x, weight.shape, weight, epsilon)
