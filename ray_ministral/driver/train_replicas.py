"""The pipelines of a training job: all replicas, of as many stages as the cluster has room for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ray_ministral.config import StageSpec
from ray_ministral.driver.cluster import Resolved, resolve
from ray_ministral.driver.pipeline import Pipeline
from ray_ministral.driver.places import Announce
from ray_ministral.driver.train_job import TrainJob
from ray_ministral.errors import PlacementError
from ray_ministral.training.plan import TrainStageOptions

SHRINK_AFTER_S = 30.0
"""How long a number of stages may wait for room before a smaller one is tried, where `--min-stages` allows it."""


def start_replicas(
    job: TrainJob, actor_class: Any, generation: int, announce: Announce
) -> tuple[list[Pipeline], Resolved]:
    """Start all replicas alike, with `--stages` stages, or with fewer down to `--min-stages` where there is no room.

    The caller lets them load, waits for them and closes them. Raises `PlacementError` where there is no room for the
    fewest, either; `ConfigError` for a device that the cluster lacks.
    """
    config, fewest = job.config.pipeline, job.config.fewest_stages
    # A GPU for each of fewer stages is better than none.
    device = resolve(replace(config, stages=fewest)).device
    resolved = resolve(replace(config, device=device))
    for stages in range(config.stages, fewest - 1, -1):
        patience = config if stages == fewest else replace(config, placement_timeout_s=SHRINK_AFTER_S)
        with ExitStack() as started:
            try:
                replicas = []
                for replica in range(config.replicas):
                    pipeline = Pipeline.start(
                        f"replica {replica}",
                        actor_class=actor_class,
                        num_stages=stages,
                        config=patience,
                        resolved=resolved,
                        announce=announce,
                        generation=generation,
                    )
                    started.callback(pipeline.close)
                    replicas.append(pipeline)
            except PlacementError as error:
                if stages == fewest:
                    raise
                announce(f"{error}; trying {stages - 1} stages, as --min-stages {fewest} allows")
            else:
                started.pop_all()
                return replicas, resolved
    raise AssertionError("the last try returns or raises")


def stage_arguments(
    job: TrainJob,
    chunks: Sequence[StageSpec],
    stages: int,
    replica: int,
    resolved: Resolved,
    checkpoint: str | None,
) -> list[TrainStageOptions]:
    """What the actor of each stage loads: chunk c belongs to stage c modulo `stages`."""
    config = job.config
    return [
        TrainStageOptions(
            model_dir=job.model_dir,
            chunks=tuple(enumerate(chunks))[stage::stages],
            stage=stage,
            num_stages=stages,
            num_chunks=len(chunks),
            replica=replica,
            num_replicas=config.pipeline.replicas,
            device=resolved.device,
            dtype=resolved.dtype,
            threads=resolved.threads,
            optimizer=config.optimizer,
            freeze=config.freeze,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            recompute=config.recompute,
            seed=config.seed,
            checkpoint=checkpoint,
        )
        for stage in range(stages)
    ]
