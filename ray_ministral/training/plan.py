"""`TrainPlan`: what all stages do in one optimizer step, as data. Small; no torch, no pixels, no activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ray_ministral.config import Freezable, OptimizerConfig, StageSpec
from ray_ministral.pipeline.schedule import RECEIVES, Action
from ray_ministral.pipeline.simulator import Span

IGNORED = -100
"""A target that asks for no prediction."""


@dataclass(frozen=True)
class TrainStageOptions:
    """What one stage of one replica is made with. Chunks by global number; `freeze` as in `TrainConfig`.

    checkpoint: what it is read from, None for the model of `model_dir`.
    """

    model_dir: str
    chunks: tuple[tuple[int, StageSpec], ...]
    stage: int
    num_stages: int
    num_chunks: int
    replica: int
    num_replicas: int
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    threads: int
    optimizer: OptimizerConfig
    freeze: tuple[Freezable, ...] = ()
    lora_rank: int | None = None
    lora_alpha: float | None = None
    recompute: bool = False
    seed: int = 0
    checkpoint: str | None = None


@dataclass(frozen=True, eq=False)
class TrainMicrobatch:
    """Some samples end to end.

    lengths: tokens of each sample. token_ids: int32 [T]. targets: int32 [T], what each token should predict, `IGNORED`
    where it doesn't matter. images: rows of pixel blocks, in order, as (block, row).
    """

    lengths: tuple[int, ...]
    token_ids: np.ndarray
    targets: np.ndarray
    images: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that the loss counts."""
        return int((self.targets != IGNORED).sum())

    def positions(self) -> np.ndarray:
        """int64 [T]."""
        return np.concatenate([np.arange(length, dtype=np.int64) for length in self.lengths])


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """One optimizer step: its microbatches, and the actions of the stage that it is sent to.

    total_targets: tokens that the loss counts, over all microbatches of all replicas: what the sum is divided by.
    """

    step: int
    generation: int
    microbatches: tuple[TrainMicrobatch, ...]
    actions: tuple[Action, ...]
    total_targets: int


@dataclass(frozen=True)
class StageReport:
    """What a stage says when its compute is done and nothing is committed.

    losses: on the last stage, the sum of token losses of each microbatch (fp32, not divided). squared_norms: of each
    parameter's gradient, by the global Hugging Face name (names, for a fused one). started: seconds since the epoch,
    by this stage's clock. spans: each action, in seconds since then; RECV is the waiting alone. seconds: of the whole
    phase, with what follows the actions (tied embedding, replicas, norms). peak_rss_bytes: of the process so far.
    """

    losses: tuple[float, ...]
    squared_norms: dict[str, float]
    started: float
    seconds: float
    spans: tuple[Span, ...]
    peak_rss_bytes: int

    @property
    def busy_seconds(self) -> float:
        """Without the waiting for messages."""
        return self.seconds - sum(span.end - span.start for span in self.spans if span.action.kind in RECEIVES)
