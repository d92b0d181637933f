"""What has to move when the cut of a model changes: a pure function from who holds what to who sends what to whom.

A model consists of pieces, none of which is ever cut: decoder layers, embedding, vision tower with projector, final
norm, output layer. No Ray and no torch; `pieces` has their tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ray_ministral.config import StageSpec
from ray_ministral.model.architecture import Architecture
from ray_ministral.model.checkpoint import EMBEDDING, OUTPUT_LAYER
from ray_ministral.pipeline.partition import Partition

_LAYER = re.compile(r"language_model\.layers\.(\d+)\.")


@dataclass(frozen=True, order=True)
class Piece:
    """A part of the model that moves as a whole; `layer` counts over the whole decoder, of the others it is None."""

    kind: Literal["layer", "embedding", "vision", "norm", "output"]
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"layer {self.layer}"


EMBEDDING_PIECE, VISION, NORM, OUTPUT = Piece("embedding"), Piece("vision"), Piece("norm"), Piece("output")


def piece_of(name: str) -> Piece:
    """The piece that a tensor belongs to, by its global name (`peft`'s for an adapter)."""
    if "vision_tower." in name or "multi_modal_projector." in name:
        return VISION
    layer = _LAYER.search(name)
    if layer is not None:
        return Piece("layer", int(layer[1]))
    if name == EMBEDDING:
        return EMBEDDING_PIECE
    return OUTPUT if name == OUTPUT_LAYER else NORM


def pieces_of(specs: Collection[StageSpec]) -> frozenset[Piece]:
    """What a stage with these chunks holds."""
    found = {Piece("layer", layer) for spec in specs for layer in spec.layers}
    if any(spec.is_first for spec in specs):
        found |= {EMBEDDING_PIECE, VISION}
    if any(spec.is_last for spec in specs):
        found |= {NORM, OUTPUT}
    return frozenset(found)


def pieces_of_stages(chunks: Partition, num_stages: int) -> tuple[frozenset[Piece], ...]:
    """What each stage holds, where chunk c belongs to stage c modulo `num_stages`."""
    return tuple(pieces_of(chunks.stages[stage::num_stages]) for stage in range(num_stages))


def piece_sizes(arch: Architecture) -> dict[Piece, int]:
    """Parameters of each piece of a model."""
    sizes = {Piece("layer", layer): arch.layer_parameters for layer in range(arch.num_layers)}
    return sizes | {
        EMBEDDING_PIECE: arch.embedding_parameters,
        VISION: arch.vision_parameters,
        NORM: arch.hidden_size,
        OUTPUT: arch.embedding_parameters,
    }


@dataclass(frozen=True)
class Move:
    """Pieces that go from one place to another."""

    source: int
    target: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Migration:
    """How to come to a new cut. Places are numbered as in `plan_migration`.

    places: the place of each new stage. moves: what is sent, by target and source. missing: what a place needs that
    nobody holds. moved: the size of all that is sent.
    """

    places: tuple[int, ...]
    moves: tuple[Move, ...]
    missing: Mapping[int, frozenset[Piece]]
    moved: int


def plan_migration(
    held: Sequence[Collection[Piece]], wanted: Sequence[Collection[Piece]], sizes: Mapping[Piece, int]
) -> Migration:
    """From what each place holds (nothing: a new one) to stages that each hold what is `wanted` of it.

    Stages go to the places that have most of them already, in the order that they have; what a place keeps is not
    moved. Raises ValueError where there are fewer places than stages.
    """
    if len(held) < len(wanted):
        raise ValueError(f"{len(wanted)} stages for {len(held)} places: start more actors, or use fewer stages")
    places = _assign(held, wanted, sizes)
    sources = {piece: place for place in reversed(range(len(held))) for piece in held[place]}
    moves: dict[tuple[int, int], list[Piece]] = {}
    missing: dict[int, set[Piece]] = {}
    for stage, target in enumerate(places):
        for piece in sorted(set(wanted[stage]) - set(held[target]), key=_order):
            if piece in sources:
                moves.setdefault((target, sources[piece]), []).append(piece)
            else:
                missing.setdefault(target, set()).add(piece)
    return Migration(
        places=places,
        moves=tuple(Move(source, target, tuple(pieces)) for (target, source), pieces in sorted(moves.items())),
        missing={place: frozenset(pieces) for place, pieces in missing.items()},
        moved=sum(sizes[piece] for pieces in moves.values() for piece in pieces),
    )


def _assign(
    held: Sequence[Collection[Piece]], wanted: Sequence[Collection[Piece]], sizes: Mapping[Piece, int]
) -> tuple[int, ...]:
    """The place of each stage: of all pairings that keep the order, the one in which most stays where it is.

    Stages that gain nothing by any place take those that are left. With one chunk a stage, a pairing that crosses
    never keeps more: what places and stages hold are intervals in one order.
    """
    kept = [[sum(sizes[piece] for piece in set(has) & set(stage)) for stage in wanted] for has in held]
    # best[p][s]: of the first p places and s stages, what is kept
    best = [[0] * (len(wanted) + 1) for _ in range(len(held) + 1)]
    for place in range(len(held)):
        for stage in range(len(wanted)):
            pair = best[place][stage] + kept[place][stage]
            best[place + 1][stage + 1] = max(best[place][stage + 1], best[place + 1][stage], pair)
    chosen: dict[int, int] = {}
    place, stage = len(held), len(wanted)
    while place and stage:
        if best[place][stage] == best[place - 1][stage]:
            place -= 1
        elif best[place][stage] == best[place][stage - 1]:
            stage -= 1
        else:
            place, stage = place - 1, stage - 1
            chosen[stage] = place
    left = iter(sorted(set(range(len(held))) - set(chosen.values()), key=lambda place: bool(held[place])))
    return tuple(chosen[stage] if stage in chosen else next(left) for stage in range(len(wanted)))


def _order(piece: Piece) -> tuple[str, int]:
    return piece.kind, -1 if piece.layer is None else piece.layer


def newest_complete(
    wanted: Collection[Piece], live: Sequence[tuple[int, Collection[Piece]]], kept: Mapping[int, Collection[Piece]]
) -> int | None:
    """The last step of which every piece exists: in a live stage, as (its step, its pieces), or kept as a copy.

    None where there is no such step.
    """
    steps: dict[int, set[Piece]] = {step: set(pieces) for step, pieces in kept.items()}
    for step, pieces in live:
        steps.setdefault(step, set()).update(pieces)
    complete = [step for step, pieces in steps.items() if pieces >= set(wanted)]
    return max(complete, default=None)
