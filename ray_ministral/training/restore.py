"""A stage from a checkpoint, however the run was cut that wrote it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ray_ministral.errors import InputError
from ray_ministral.model.architecture import is_tied
from ray_ministral.model.checkpoint import EMBEDDING, OUTPUT_LAYER, canonical_name
from ray_ministral.model.low_rank import adapters_of
from ray_ministral.model.ministral3 import Ministral3Model
from ray_ministral.model.weights import TensorSlot, parameter_slots
from ray_ministral.training.checkpoint import MODEL, OPTIMIZER
from ray_ministral.training.migration import Piece
from ray_ministral.training.model_directory import ADAPTER_CONFIG
from ray_ministral.training.muon import STEP
from ray_ministral.training.optimizer import MASTER, Optimizer
from ray_ministral.training.stage import TrainStage

Read = Callable[[str], Tensor | None]
"""A weight by its global name, a tensor of the optimizer by NAME.kind; None where there is none."""


def load_stage(stage: TrainStage, checkpoint: Path) -> None:
    """Set weights, masters, moments and step counts of a stage from a checkpoint; only its own are read.

    What the run that wrote the checkpoint did not train starts with fresh moments. The dtype may differ: masters come
    from masters. Raises `InputError` where the checkpoint does not fit the stage.
    """
    adapted = any(next(adapters_of(chunk), None) is not None for chunk in stage.chunks.values())
    if adapted != (checkpoint / MODEL / ADAPTER_CONFIG).exists():
        has, wants = ("all weights", "adapters") if adapted else ("adapters", "all weights")
        raise InputError(
            f"{checkpoint} holds {has}, this run trains {wants}: use the --lora-rank of the run that wrote it, or "
            f"begin a new run from its model with --model{'' if adapted else ' (merged first)'}"
        )
    restore(stage, _reader(checkpoint), f"{checkpoint}")


def restore(stage: TrainStage, read: Read, source: str) -> None:
    """Set a stage from whatever has its tensors by name. `source` names it in errors. Raises `InputError`."""
    for chunk in stage.chunks.values():
        restoring = _Chunk(chunk, stage.optimizer, read, source)
        for parameter in restoring.slots:
            restoring.restore(parameter)


def restore_parameters(
    stage: TrainStage,
    piece_of: Callable[[str], Piece | None],
    read: Callable[[Piece, str], Tensor | None],
    source: str,
) -> None:
    """Set those parameters of a stage that belong to a piece, by what `read` has of the piece; as `restore` otherwise.

    `piece_of` gets a parameter's own name. Weights that are frozen are set where `read` has them.
    """
    for chunk in stage.chunks.values():
        for parameter, slots in parameter_slots(chunk).items():
            piece = piece_of(next(iter(slots)))
            if piece is not None:
                _Chunk(chunk, stage.optimizer, partial(read, piece), source, frozen="where there").restore(parameter)


class _Chunk:
    """One chunk while it is restored, a parameter at a time."""

    def __init__(
        self,
        chunk: Ministral3Model,
        optimizer: Optimizer,
        read: Read,
        source: str,
        *,
        frozen: Literal["wanted", "where there"] = "wanted",
    ) -> None:
        self._optimizer, self._read, self._source = optimizer, read, source
        self._frozen = frozen
        self._adapted = next(adapters_of(chunk), None) is not None
        stored = {OUTPUT_LAYER: EMBEDDING} if is_tied(chunk.hf_config) else {}
        parameters = parameter_slots(chunk)
        self._keys = {parameter: next(iter(slots)) for parameter, slots in parameters.items()}
        self.slots = {
            parameter: {stored.get(name, name): slot for name, slot in slots.items()}
            for parameter, slots in parameters.items()
        }

    def restore(self, parameter: nn.Parameter) -> None:
        if not parameter.requires_grad:
            for name, slot in self.slots[parameter].items():
                if self._frozen == "where there":
                    found = self._read(name)
                    if found is not None:
                        slot.write(self._fitting(name, slot, found))
                elif not self._adapted:  # else it is as training began, and not in the checkpoint
                    slot.write(self._fitting(name, slot, self._wanted(name)))
            return
        master = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
        for name, slot in self.slots[parameter].items():
            found = self._read(f"{name}.{MASTER}")
            slot.put(self._fitting(name, slot, self._wanted(name) if found is None else found), master)
        self._optimizer.load_state(self._keys[parameter], master, self._moments(parameter, master))

    def _moments(self, parameter: nn.Parameter, like: Tensor) -> dict[str, Tensor]:
        """Moments and step count of a parameter; none where none of its tensors was trained before."""
        slots = self.slots[parameter]
        steps = {name: self._read(f"{name}.{STEP}") for name in slots}
        counts = {None if step is None else float(step) for step in steps.values()}
        if counts == {None}:
            return {}
        if len(counts) > 1:
            raise InputError(
                f"{self._source}: the tensors {', '.join(slots)} are one parameter here, and were stepped differently "
                f"({', '.join(str(count) for count in counts)} times): this checkpoint was not written by this project"
            )
        moments = {STEP: torch.tensor(counts.pop(), dtype=torch.float32)}
        for kind in self._optimizer.moments(self._keys[parameter]):
            values = torch.empty_like(like)
            for name, slot in slots.items():
                slot.put(self._fitting(name, slot, self._wanted(f"{name}.{kind}")), values)
            moments[kind] = values
        return moments

    def _wanted(self, name: str) -> Tensor:
        tensor = self._read(name)
        if tensor is None:
            raise InputError(
                f"{self._source} has no tensor {name!r}: it was written for another model, or with another "
                "--lora-rank or --optimizer"
            )
        return tensor

    def _fitting(self, name: str, slot: TensorSlot, tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) != slot.shape:
            raise InputError(
                f"{self._source}: {name} is {list(tensor.shape)}, the model has {list(slot.shape)}: it was written for "
                "another model or with another --lora-rank"
            )
        return tensor


def _reader(checkpoint: Path) -> Read:
    """Reads tensors out of a checkpoint's files. A file is mapped anew for each: no mapped page outlives its copy."""
    places: dict[str, tuple[Path, str]] = {}
    for folder in (MODEL, OPTIMIZER):
        for path in sorted((checkpoint / folder).glob("*.safetensors")):
            with _opened(path) as file:
                places |= {canonical_name(stored): (path, stored) for stored in file.keys()}  # noqa: SIM118

    def read(name: str) -> Tensor | None:
        if name not in places:
            return None
        path, stored = places[name]
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    return read


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}. Resume from another checkpoint") from error
