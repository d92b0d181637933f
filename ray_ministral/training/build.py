"""A `TrainStage` from its options: chunks with weights, what is frozen, process groups. What an actor calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ray_ministral.data.images import ImagePreprocessor
from ray_ministral.model.weights import load_chunk
from ray_ministral.pipeline.stage import DTYPES
from ray_ministral.pipeline.transport import GroupTransport, GroupTwins, join_store, make_group
from ray_ministral.training.lora import LoraOptions, add_adapters
from ray_ministral.training.plan import TrainStageOptions
from ray_ministral.training.stage import TrainStage


def build_stage(options: TrainStageOptions, on_progress: Callable[[int, int], None] | None = None) -> TrainStage:
    """Read the stage's chunks and make its optimizer. Raises `ModelError`."""
    torch.set_num_threads(options.threads)
    chunks = {}
    for number, spec in options.chunks:
        chunk = load_chunk(
            options.model_dir,
            spec,
            dtype=DTYPES[options.dtype],
            device=options.device,
            share_output_layer=False,
            on_progress=on_progress,
        )
        chunk.freeze("language" in options.freeze, "vision" in options.freeze, "projector" in options.freeze)
        if options.lora_rank is not None:
            add_adapters(chunk, LoraOptions(options.lora_rank, options.lora_alpha), options.seed)
        chunks[number] = chunk
    table = ImagePreprocessor(options.model_dir).normalisation_table() if options.stage == 0 else None
    return TrainStage(
        chunks,
        stage=options.stage,
        num_stages=options.num_stages,
        num_chunks=options.num_chunks,
        optimizer=options.optimizer,
        pixel_table=table,
        recompute=options.recompute,
    )


def connect_stage(
    stage: TrainStage,
    options: TrainStageOptions,
    generation: int,
    address: tuple[str, int],
    *,
    own_store: Any,
    host: str,
    timeout_s: float,
) -> None:
    """Meet the other stages at the store of `address` (`own_store` where this process serves it), bound to `host`."""
    store = own_store if own_store is not None else join_store(*address, timeout_s)
    device = torch.device(options.device)

    def group(name: str, rank: int, size: int) -> Any:
        full = f"generation-{generation}-{name}"
        return make_group(store, full, rank, size, device=device, host=host, timeout_s=timeout_s)

    transport = twins = None
    if options.num_stages > 1:
        name = f"replica-{options.replica}"
        down = group(name, options.stage, options.num_stages)
        up = group(f"{name}-up", options.stage, options.num_stages) if device.type == "cuda" else down
        transport = GroupTransport(down, up, options.stage, device)
    if options.num_replicas > 1:
        twins = GroupTwins(group(f"stage-{options.stage}", options.replica, options.num_replicas))
    stage.connect(transport, twins)
    stage.store = store
