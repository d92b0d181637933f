"""A `TrainStage` from its options: chunks with weights, what is frozen, process groups. What an actor calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ray_ministral.config import StageSpec
from ray_ministral.data.images import ImagePreprocessor
from ray_ministral.model.architecture import is_tied
from ray_ministral.model.checkpoint import EMBEDDING, OUTPUT_LAYER
from ray_ministral.model.ministral3 import Ministral3Model
from ray_ministral.model.weights import load_chunk, parameter_slots
from ray_ministral.pipeline.stage import DTYPES
from ray_ministral.pipeline.transport import GroupTransport, GroupTwins, join_store, make_group
from ray_ministral.training.lora import LoraOptions, add_adapters
from ray_ministral.training.migration import Piece, piece_of
from ray_ministral.training.pieces import Parcel, take
from ray_ministral.training.plan import TrainStageOptions
from ray_ministral.training.restore import load_stage
from ray_ministral.training.stage import TrainStage


def build_stage(options: TrainStageOptions, on_progress: Callable[[int, int], None] | None = None) -> TrainStage:
    """Read the stage's chunks, from the model or a checkpoint, and make its optimizer.

    Raises `ModelError`, `InputError`.
    """

    def read(spec: StageSpec) -> Ministral3Model:
        return load_chunk(
            options.model_dir,
            spec,
            dtype=DTYPES[options.dtype],
            device=options.device,
            share_output_layer=False,
            on_progress=on_progress,
        )

    torch.set_num_threads(options.threads)
    stage = _make_stage(options, make_chunks(options, read))
    if options.checkpoint is not None:
        load_stage(stage, Path(options.checkpoint))
    return stage


def rebuild_stage(old: TrainStage, options: TrainStageOptions, parcels: Sequence[Parcel], source: str) -> TrainStage:
    """The stage that `options` say, out of another one in this process and of what others have given.

    What both have is moved by reference: weights, masters and moments. Only frozen weights that are neither here nor
    given are read. `old` cannot be used any more. Raises `PieceError` where something trained is neither.
    """
    config = next(iter(old.chunks.values())).hf_config

    def blank(spec: StageSpec) -> Ministral3Model:
        return Ministral3Model(
            config,
            stage=spec,
            dtype=DTYPES[options.dtype],
            device=options.device,
            initialize=False,
            share_output_layer=False,
        )

    chunks = make_chunks(options, blank)
    held = {next(iter(slots)): p for chunk in old.chunks.values() for p, slots in parameter_slots(chunk).items()}
    given = {name for parcel in parcels for state in parcel.values() for name in state.tensors}
    missing: set[Piece] = set()
    for number, chunk in chunks.items():
        unread: list[str] = []
        for parameter, slots in parameter_slots(chunk).items():
            name = next(iter(slots))
            if name in held:
                parameter.data = held[name].data
                continue
            missing.add(piece_of(name))
            if not parameter.requires_grad and not given.issuperset(_stored(chunk, slots)):
                unread.append(name)
        if unread:
            _read_frozen(chunk, unread, dict(options.chunks)[number], options)
    stage = _make_stage(options, chunks)
    stage.optimizer.adopt(old.optimizer)
    take(stage, missing, parcels, source)
    return stage


def _stored(chunk: Ministral3Model, names: Iterable[str]) -> set[str]:
    """The names under which these tensors are sent: the output layer of a tied model is the embedding."""
    tied = is_tied(chunk.hf_config)
    return {EMBEDDING if tied and name == OUTPUT_LAYER else name for name in names}


def _read_frozen(chunk: Ministral3Model, names: Sequence[str], spec: StageSpec, options: TrainStageOptions) -> None:
    """Frozen weights whose stage was lost: nobody keeps copies of what never changes. They are read once more."""
    read = build_stage(replace(options, chunks=((0, spec),), stage=1))
    by_name = {next(iter(slots)): parameter for parameter, slots in parameter_slots(read.chunks[0]).items()}
    for parameter, slots in parameter_slots(chunk).items():
        name = next(iter(slots))
        if name in names:
            parameter.data = by_name[name].data


def make_chunks(options: TrainStageOptions, make: Callable[[StageSpec], Ministral3Model]) -> dict[int, Ministral3Model]:
    """The chunks of a stage by global number, with adapters, and with what is not trained frozen."""
    chunks = {}
    for number, spec in options.chunks:
        chunk = make(spec)
        chunk.freeze("language" in options.freeze, "vision" in options.freeze, "projector" in options.freeze)
        if options.lora_rank is not None:
            add_adapters(chunk, LoraOptions(options.lora_rank, options.lora_alpha), options.seed)
        chunks[number] = chunk
    return chunks


def _make_stage(options: TrainStageOptions, chunks: dict[int, Ministral3Model]) -> TrainStage:
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
