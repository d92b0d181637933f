"""What a stage adds to a checkpoint: its tensors by global names, written at once or from a copy beside training."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ray_ministral.model.architecture import is_tied
from ray_ministral.model.checkpoint import OUTPUT_LAYER
from ray_ministral.model.low_rank import adapters_of
from ray_ministral.model.ministral3 import Ministral3Model
from ray_ministral.model.weights import parameter_slots, stored_tensors, weight_file_name
from ray_ministral.training.checkpoint import MODEL, OPTIMIZER, StagePart
from ray_ministral.training.files import seal
from ray_ministral.training.lora import adapter_tensors
from ray_ministral.training.optimizer import Optimizer
from ray_ministral.training.stage import TrainStage

WRITER_NICENESS = 10
"""Of the writing thread: training goes first where both want a core."""

SNAPSHOT_MARGIN = 2.0
"""So many times its size must be free before a snapshot is taken: other stages on the machine take one, too."""


@dataclass(frozen=True, eq=False)
class TensorFile:
    """A safetensors file to be: its path within the checkpoint, and its tensors (CPU, contiguous)."""

    path: str
    tensors: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class StageSnapshot:
    """A stage between two steps, in CPU memory, apart from the stage itself."""

    chunks: tuple[int, ...]
    num_chunks: int
    files: tuple[TensorFile, ...]


def snapshot(stage: TrainStage) -> StageSnapshot:
    """Copy a stage: weights, masters, moments. Takes as much memory as they do; the stage can go on at once."""
    return StageSnapshot(tuple(stage.chunks), stage.num_chunks, tuple(_tensor_files(stage, copy=True)))


def save_stage(stage: TrainStage, folder: Path) -> StagePart:
    """Write a stage's files below `folder`, while it waits. Raises OSError."""
    return _write(tuple(stage.chunks), stage.num_chunks, _tensor_files(stage, copy=False), folder)


def write_snapshot(taken: StageSnapshot, folder: Path) -> StagePart:
    """Write a snapshot's files below `folder`. Raises OSError."""
    return _write(taken.chunks, taken.num_chunks, iter(taken.files), folder)


class BackgroundWriter:
    """Writes snapshots in a thread of its own, one after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint", initializer=_give_way)

    def save(self, stage: TrainStage, folder: Path) -> Future[StagePart]:
        """Write a stage as it is now: beside what it does next if there is memory for a copy, else before that."""
        if _spare_memory() > SNAPSHOT_MARGIN * _snapshot_bytes(stage):
            return self.submit(snapshot(stage), folder)
        done: Future[StagePart] = Future()
        done.set_result(save_stage(stage, folder))
        return done

    def submit(self, taken: StageSnapshot, folder: Path) -> Future[StagePart]:
        """The future gives the part, or raises OSError. It holds the snapshot's memory until it is done."""
        return self._pool.submit(write_snapshot, taken, folder)

    def close(self) -> None:
        """Wait until what was submitted is written."""
        self._pool.shutdown()


def _spare_memory() -> int:
    """Bytes that this machine can give without taking them from anybody."""
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)


def _snapshot_bytes(stage: TrainStage) -> int:
    """Weights, masters and two moments, at most."""
    parameters = [parameter for chunk in stage.chunks.values() for parameter in chunk.parameters()]
    return sum(p.nbytes + (12 * p.numel() if p.requires_grad else 0) for p in parameters)


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere the niceness would be that of the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)


def _write(chunks: tuple[int, ...], num_chunks: int, files: Iterator[TensorFile], folder: Path) -> StagePart:
    from safetensors.torch import save_file

    for name in (MODEL, OPTIMIZER):
        (folder / name).mkdir(parents=True, exist_ok=True)
    records = []
    weight_map: dict[str, str] = {}
    for file in files:
        save_file(file.tensors, folder / file.path, metadata={"format": "pt"})
        records.append(seal(folder, file.path))
        if file.path.startswith(f"{MODEL}/"):
            weight_map |= dict.fromkeys(file.tensors, file.path.removeprefix(f"{MODEL}/"))
    return StagePart(chunks, num_chunks, tuple(records), weight_map)


def _tensor_files(stage: TrainStage, *, copy: bool) -> Iterator[TensorFile]:
    """Two a chunk, named by the chunk's number; without `copy` views of the stage's own tensors where possible.

    Under LoRA only the adapters: the other weights are those that training began with.
    """
    for number, chunk in stage.chunks.items():
        name = weight_file_name(number, stage.num_chunks)
        adapted = next(adapters_of(chunk), None) is not None
        yield _file(f"{MODEL}/{name}", adapter_tensors(chunk) if adapted else stored_tensors(chunk), copy)
        tensors = dict(_optimizer_tensors(chunk, stage.optimizer))
        if tensors:
            yield _file(f"{OPTIMIZER}/{name.replace('model', 'optimizer')}", tensors, copy)


def _file(path: str, tensors: dict[str, Tensor], copy: bool) -> TensorFile:
    return TensorFile(
        path, {name: tensor.detach().to("cpu", copy=copy).contiguous() for name, tensor in tensors.items()}
    )


def _optimizer_tensors(chunk: Ministral3Model, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Masters and moments of what is trained; the output layer of a tied model has those of the embedding."""
    tied = is_tied(chunk.hf_config)
    for parameter, slots in parameter_slots(chunk).items():
        key = next(iter(slots))
        if not parameter.requires_grad or (tied and key == OUTPUT_LAYER):
            continue
        state = optimizer.state(key)
        for name, slot in slots.items():
            for kind, values in state.items():  # one count for several tensors
                yield f"{name}.{kind}", slot.read(values) if values.ndim else values.clone()
