"""The state of pieces of the model as numpy arrays by global names: what one stage gives and another takes in.

Weights (a master in fp32 where there is one, and then no rounded weight beside it), moments and step counts. Views of a
stage's memory where that is possible: whoever gets them through Ray has a copy.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ray_ministral.errors import PieceError
from ray_ministral.model.architecture import is_tied
from ray_ministral.model.checkpoint import EMBEDDING, OUTPUT_LAYER
from ray_ministral.model.weights import parameter_slots
from ray_ministral.pipeline.wire import from_wire, to_wire
from ray_ministral.training.migration import EMBEDDING_PIECE, OUTPUT, Piece, piece_of
from ray_ministral.training.optimizer import MASTER
from ray_ministral.training.restore import restore_parameters
from ray_ministral.training.stage import TrainStage

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class PieceState:
    """Tensors of one piece: a weight by its name, what the optimizer has of it by NAME.kind. bf16 is seen as int16.

    checksum: of all of them, None where nobody has made one.
    """

    tensors: dict[str, np.ndarray]
    checksum: int | None


Parcel = Mapping[Piece, PieceState]
"""Some pieces as they go from one stage to another."""


def checksum(tensors: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of names, shapes and bytes."""
    value = 0
    for name in sorted(tensors):
        array = tensors[name]
        value = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), value)
        value = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, value)
    return value


def give(
    stage: TrainStage, pieces: Collection[Piece] | None = None, *, checked: bool = True
) -> dict[Piece, PieceState]:
    """The state of some pieces, frozen weights included. None: of all that is trained, without what is frozen.

    The output layer of a tied model is the embedding, and goes by its name.
    """
    found: dict[Piece, dict[str, np.ndarray]] = {}
    for chunk in stage.chunks.values():
        tied = is_tied(chunk.hf_config)
        for parameter, slots in parameter_slots(chunk).items():
            key = next(iter(slots))
            piece = piece_of(key)
            if piece not in pieces if pieces is not None else not parameter.requires_grad:
                continue
            state: dict[str, Tensor] = stage.optimizer.state(key) if parameter.requires_grad else {}
            for name, slot in slots.items():
                stored = EMBEDDING if tied and name == OUTPUT_LAYER else name
                tensors = found.setdefault(piece, {})
                if MASTER not in state:
                    tensors[stored] = to_wire(slot.read(parameter.data))
                for kind, values in state.items():
                    tensors[f"{stored}.{kind}"] = to_wire(slot.read(values) if values.ndim else values)
    return {piece: PieceState(tensors, checksum(tensors) if checked else None) for piece, tensors in found.items()}


def take(stage: TrainStage, wanted: Collection[Piece], parcels: Sequence[Parcel], source: str) -> None:
    """Set some pieces of a stage from what was given. What is frozen, and not given, stays as it is.

    Raises `PieceError` where a piece is not as it was sent, or was not sent, `InputError` where a tensor is missing.
    """
    given: dict[Piece, PieceState] = {}
    for parcel in parcels:
        given.update({piece: state for piece, state in parcel.items() if piece in wanted})
    if _is_tied(stage) and OUTPUT in wanted and OUTPUT not in given and EMBEDDING_PIECE in given:
        given[OUTPUT] = given[EMBEDDING_PIECE]
    for piece, state in given.items():
        if state.checksum is not None and checksum(state.tensors) != state.checksum:
            raise PieceError(
                f"{piece} came with other bytes than it was sent with ({source}): the memory or the network of one of "
                "the two machines is faulty; the step before is intact"
            )
    for piece in wanted:
        if piece not in given and _is_trained(stage, piece):
            raise PieceError(f"{piece} was not sent ({source}): it is needed, for this run trains it")
    by_piece = {piece: state.tensors for piece, state in given.items()}

    def read(piece: Piece, name: str) -> Tensor | None:
        array = by_piece.get(piece, {}).get(name)
        if array is None:
            return None
        dtype = torch.bfloat16 if array.dtype == np.int16 else torch.float32
        return from_wire(array, dtype, CPU)

    restore_parameters(stage, lambda key: None if piece_of(key) not in given else piece_of(key), read, source)


def _is_tied(stage: TrainStage) -> bool:
    return is_tied(next(iter(stage.chunks.values())).hf_config)


def _is_trained(stage: TrainStage, piece: Piece) -> bool:
    return any(piece_of(name) == piece for name in stage.optimizer.parameters)
