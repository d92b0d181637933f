"""Steps of training on threads: batches that differ from step to step, layouts of stages, and whole runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_ministral.data.images import ImagePreprocessor
from ray_ministral.pipeline.generators import make_schedule
from ray_ministral.pipeline.schedule import Schedule
from ray_ministral.training.plan import IGNORED, TrainMicrobatch
from ray_ministral.training.rates import LearningRate
from tests.parity.small_models import Row, make_row
from tests.parity.train_harness import Pipeline, make_replicas, step_on

MICROBATCHES = 4
RATE = LearningRate(3e-3, warmup_steps=3, total_steps=25, schedule="cosine")
CLIP_NORM = 0.5
"""Below the norms of the small models here: clipping is active."""


@dataclass(frozen=True)
class Batch:
    """A step's microbatches and the pixels that they name."""

    microbatches: tuple[TrainMicrobatch, ...]
    blocks: tuple[list[list[np.ndarray]], ...]
    rows: tuple[tuple[Row, ...], ...]


def make_batch(step: int, microbatches: int = MICROBATCHES) -> Batch:
    """Different for each step: lengths, images, and which tokens count; one microbatch is text alone."""
    generator = np.random.default_rng(1000 + step)
    rows = [
        [
            make_row(generator, int(generator.integers(4, 20)), [(2, 3)] if (index + row) % 3 and index else [])
            for row in range(1 + (index + step) % 2)
        ]
        for index in range(microbatches)
    ]
    return batch_of(rows, generator)


def batch_of(rows: Sequence[Sequence[Row]], generator: np.random.Generator, masked: Collection[int] = ()) -> Batch:
    """A step of these rows, those of each microbatch end to end. An answer begins somewhere in each row; there is none
    in the microbatches `masked`."""
    microbatches, pixels = [], []
    for index, own in enumerate(rows):
        token_ids = np.concatenate([row.token_ids.numpy() for row in own]).astype(np.int32)
        targets = np.full_like(token_ids, IGNORED)
        start, images = 0, []
        for row in own:
            count = len(row.token_ids)
            answer = start + int(generator.integers(1, count - 2))
            if index not in masked:
                targets[answer : start + count - 1] = token_ids[answer + 1 : start + count]
            start += count
            if row.images:
                images.append((0, len(pixels)))
                pixels.append(list(row.images))
        microbatches.append(TrainMicrobatch(tuple(len(r.token_ids) for r in own), token_ids, targets, tuple(images)))
    return Batch(tuple(microbatches), (pixels,), tuple(map(tuple, rows)))


@dataclass(frozen=True)
class Layout:
    """How a pipeline of four layers is cut and what it runs."""

    chunk_layers: tuple[int, ...]
    num_stages: int
    schedule: str

    @property
    def name(self) -> str:
        """For the ids of tests."""
        return f"{self.num_stages}-{self.schedule}-{'-'.join(map(str, self.chunk_layers))}"

    def pipeline(self, model_dir: Path, **options: Any) -> Pipeline:
        table = ImagePreprocessor(model_dir).normalisation_table()
        return Pipeline(model_dir, self.chunk_layers, self.num_stages, pixel_table=table, **options)

    def replicas(self, number: int, model_dir: Path, **options: Any) -> list[Pipeline]:
        """Several pipelines whose stages add their gradients up."""
        table = ImagePreprocessor(model_dir).normalisation_table()
        return make_replicas(
            number, model_dir, self.chunk_layers, num_stages=self.num_stages, pixel_table=table, **options
        )

    def make_schedule(self, pipeline: Pipeline, microbatches: int = MICROBATCHES) -> Schedule:
        trainable = pipeline.trainable()
        first = next((chunk for chunk, trains in enumerate(trainable) if trains), len(trainable))
        return make_schedule(
            self.schedule,
            self.num_stages,
            microbatches,
            len(self.chunk_layers) // self.num_stages,
            first_trainable_chunk=first,
            frozen_chunks=[chunk for chunk, trains in enumerate(trainable) if not trains],
        )


ONE = Layout((4,), 1, "gpipe")
TWO = Layout((3, 1), 2, "1f1b")
THREE = Layout((1, 2, 1), 3, "zero-bubble")
INTERLEAVED = Layout((1, 1, 1, 1), 2, "interleaved")
FOUR = Layout((1, 1, 1, 1), 4, "zero-bubble")


def run(
    pipeline: Pipeline,
    layout: Layout,
    steps: Iterable[int],
    microbatches: int = MICROBATCHES,
    *,
    rate: LearningRate = RATE,
) -> list[tuple[float, float]]:
    """Loss and norm of each step."""
    schedule = layout.make_schedule(pipeline, microbatches)
    curve = []
    for step in steps:
        batch = make_batch(step, microbatches)
        curve.append(
            pipeline.step(schedule, batch.microbatches, *batch.blocks, learning_rate=rate.at(step), clip_norm=CLIP_NORM)
        )
    return curve


def run_replicas(
    replicas: Sequence[Pipeline],
    layout: Layout,
    steps: Iterable[int],
    microbatches: int = MICROBATCHES,
    *,
    rate: LearningRate = RATE,
) -> list[tuple[float, float]]:
    """As `run`; each replica has a run of microbatches, as `Trainer` deals them out."""
    ends = [microbatches * (replica + 1) // len(replicas) for replica in range(len(replicas))]
    shares = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    counts = [share.stop - share.start for share in shares]
    schedules = [layout.make_schedule(replicas[0], count) if count else None for count in counts]
    curve = []
    for step in steps:
        batch = make_batch(step, microbatches)
        own = [batch.microbatches[share] for share in shares]
        curve.append(step_on(replicas, schedules, own, *batch.blocks, learning_rate=rate.at(step), clip_norm=CLIP_NORM))
    return curve
