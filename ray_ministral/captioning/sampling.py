"""The next token from logits: greedy, or drawn with a random number that depends on seed, row and position alone.

So a row's caption does not depend on its neighbours, the stages or a restart. The filters are those of transformers'
`generate` in its order: temperature, then top-k, then top-p. Legend: N sequences, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ray_ministral.config import SamplingConfig


def sample(logits_NV: Tensor, sampling: SamplingConfig, keys_N: np.ndarray, positions_N: np.ndarray) -> Tensor:
    """Token ids int64 `[N]`. `keys_N` (uint64) and `positions_N` as in `StepPlan`."""
    if sampling.temperature == 0:
        return logits_NV.argmax(-1)
    scaled_NV = logits_NV.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled_NV.shape[-1]:
        values_NK, ids_NK = scaled_NV.topk(sampling.top_k, dim=-1)
    else:
        values_NK, ids_NK = scaled_NV.sort(dim=-1, descending=True, stable=True)
    weights_NK = torch.softmax(values_NK, dim=-1).double()
    cumulative_NK = weights_NK.cumsum(-1)
    if sampling.top_p is not None:
        # Keep the smallest head whose mass reaches top_p: drop what comes after the mass before it already does.
        dropped_NK = cumulative_NK - weights_NK >= sampling.top_p
        dropped_NK[:, 0] = False
        cumulative_NK = weights_NK.masked_fill(dropped_NK, 0).cumsum(-1)
    draws_N = torch.from_numpy(uniforms(sampling.seed, keys_N, positions_N)).to(logits_NV.device)
    targets_N1 = (draws_N * cumulative_NK[:, -1]).unsqueeze(1)
    chosen_N1 = torch.searchsorted(cumulative_NK, targets_N1, right=True).clamp(max=cumulative_NK.shape[1] - 1)
    return ids_NK.gather(1, chosen_N1).squeeze(1)


def uniforms(seed: int, keys_N: np.ndarray, positions_N: np.ndarray) -> np.ndarray:
    """float64 `[N]` in [0, 1): the counter-based Philox generator at key (seed, row) and counter (position)."""
    draws = [
        np.random.Generator(_philox(seed, key, position)).random()
        for key, position in zip(keys_N, positions_N, strict=True)
    ]
    return np.asarray(draws, dtype=np.float64)


def _philox(seed: int, key: int, position: int) -> np.random.Philox:
    # As arrays of uint64: of a list that mixes sizes numpy would make float64, and lose bits.
    return np.random.Philox(
        key=np.array([seed, key], dtype=np.uint64), counter=np.array([0, 0, 0, position], dtype=np.uint64)
    )
