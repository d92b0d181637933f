"""What we take from megatron-core (0.16 to 0.19), imported in this one place.

On import and when models are made it remarks on what we know: that Transformer Engine and Apex are absent (CUDA
extensions that we don't use), that `GPTModel` is to give way to `HybridModel`. `quietly` is for the latter.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = [
    "GPTModel",
    "MegatronModule",
    "PackedSeqParams",
    "ProcessGroupCollection",
    "TransformerConfig",
    "get_gpt_layer_local_spec",
    "quietly",
]


@contextmanager
def quietly() -> Iterator[None]:
    """Without megatron's warnings and remarks while a config or a model is made."""
    logger = logging.getLogger("megatron.core")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
