"""From the samples of a step to its microbatches, filled evenly by tokens.

A stage waits for its slowest microbatch, so the fullest one is what counts. Longest first, each to the lightest: at
most a third above the best there is (Graham, Bounds on multiprocessing timing anomalies, 1969).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from ray_ministral.errors import ConfigError
from ray_ministral.training.plan import TrainMicrobatch
from ray_ministral.training.targets import TrainSample


def num_microbatches(global_batch_size: int, microbatch_size: int) -> int:
    """Microbatches of a step, of `microbatch_size` samples on average. Raises ConfigError."""
    if not 1 <= microbatch_size <= global_batch_size:
        raise ConfigError(
            f"--microbatch-size {microbatch_size} must lie between 1 and --global-batch-size {global_batch_size}"
        )
    return -(-global_batch_size // microbatch_size)


def pack(token_counts: Sequence[int], num_microbatches: int) -> tuple[tuple[int, ...], ...]:
    """The samples of each microbatch, as indices into `token_counts`, which are positive.

    The same counts always give the same. Inside a microbatch samples keep their order; microbatches are in the order of
    their first samples. With fewer samples than `num_microbatches` there are only as many, of one sample each.
    """
    if num_microbatches < 1 or any(count < 1 for count in token_counts):
        raise ValueError(f"wanted a microbatch at least and positive counts, got {num_microbatches} and {token_counts}")
    number = min(num_microbatches, len(token_counts))
    microbatches: list[list[int]] = [[] for _ in range(number)]
    loads = [(0, index) for index in range(number)]
    for sample in sorted(range(len(token_counts)), key=lambda sample: (-token_counts[sample], sample)):
        load, lightest = loads[0]
        microbatches[lightest].append(sample)
        heapq.heapreplace(loads, (load + token_counts[sample], lightest))
    return tuple(sorted(tuple(sorted(microbatch)) for microbatch in microbatches))


def build_microbatches(
    blocks: Sequence[Sequence[TrainSample | None]], num_microbatches: int
) -> tuple[TrainMicrobatch, ...]:
    """The microbatches of a step from its samples, in order; None stands for a row that was skipped.

    Without a sample there are none. `blocks` are as they were prepared: the pixels of `blocks[b][r]` are row `r` of
    pixel block `b`.
    """
    placed = [
        (sample, (block, row))
        for block, samples in enumerate(blocks)
        for row, sample in enumerate(samples)
        if sample is not None
    ]
    packed = pack([sample.num_tokens for sample, _ in placed], num_microbatches)
    return tuple(_microbatch([placed[index] for index in indices]) for indices in packed)


def _microbatch(placed: Sequence[tuple[TrainSample, tuple[int, int]]]) -> TrainMicrobatch:
    samples = [sample for sample, _ in placed]
    return TrainMicrobatch(
        lengths=tuple(sample.num_tokens for sample in samples),
        token_ids=np.concatenate([sample.token_ids for sample in samples]),
        targets=np.concatenate([sample.targets for sample in samples]),
        images=tuple(place for sample, place in placed if sample.image_sizes),
    )
