"""What moves when the cut of a model changes: tables, and properties over random cuts."""

from __future__ import annotations

import itertools
import random

import pytest

from ray_ministral.pipeline.partition import Partition
from ray_ministral.training.migration import (
    EMBEDDING_PIECE,
    NORM,
    OUTPUT,
    VISION,
    Move,
    Piece,
    newest_complete,
    piece_of,
    pieces_of_stages,
    plan_migration,
)


def layer(number: int) -> Piece:
    return Piece("layer", number)


def cut(*layers: int, stages: int | None = None) -> tuple[frozenset[Piece], ...]:
    return pieces_of_stages(Partition.from_layers(layers, sum(layers)), stages or len(layers))


def sizes_of(layers: int) -> dict[Piece, int]:
    return {layer(number): 10 for number in range(layers)} | {EMBEDDING_PIECE: 30, VISION: 20, NORM: 1, OUTPUT: 30}


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("model.language_model.layers.12.mlp.up_proj.weight", layer(12)),
        ("base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_A.weight", layer(3)),
        ("model.vision_tower.transformer.layers.3.attention.q_proj.weight", VISION),
        ("model.multi_modal_projector.linear_1.weight", VISION),
        ("model.language_model.embed_tokens.weight", EMBEDDING_PIECE),
        ("model.language_model.norm.weight", NORM),
        ("lm_head.weight", OUTPUT),
    ],
)
def test_every_name_belongs_to_a_piece(name: str, piece: Piece) -> None:
    assert piece_of(name) == piece


@pytest.mark.parametrize(
    ("held", "wanted", "places", "moves", "moved"),
    [
        (cut(2, 2), cut(2, 2), (0, 1), (), 0),
        (cut(2, 2), cut(3, 1), (0, 1), (Move(1, 0, (layer(2),)),), 10),
        # Two of four go: what they had goes to the neighbours.
        (cut(1, 1, 1, 1), cut(2, 2), (0, 3), (Move(1, 0, (layer(1),)), Move(2, 3, (layer(2),))), 20),
        # One more, which is new, in the middle.
        ((*cut(2, 2), frozenset()), cut(1, 2, 1), (0, 2, 1), (Move(0, 2, (layer(1),)), Move(1, 2, (layer(2),))), 20),
        # All of it to one place: to the one that has most.
        (cut(1, 3), cut(4), (1,), (Move(0, 1, (EMBEDDING_PIECE, layer(0), VISION)),), 60),
        # Two chunks a stage, then one.
        (cut(1, 1, 1, 1, stages=2), cut(2, 2), (0, 1), (Move(1, 0, (layer(1),)), Move(0, 1, (layer(2),))), 20),
    ],
)
def test_plans(held: object, wanted: object, places: object, moves: object, moved: int) -> None:
    plan = plan_migration(held, wanted, sizes_of(4))  # type: ignore[arg-type]
    assert plan.places == places
    assert plan.moves == tuple(sorted(plan.moves, key=lambda move: (move.target, move.source)))
    assert set(plan.moves) == set(moves)  # type: ignore[call-overload]
    assert plan.moved == moved
    assert not plan.missing


def test_what_nobody_holds_is_missing() -> None:
    first, _, last = cut(1, 2, 1)
    plan = plan_migration([first, frozenset(), last], cut(1, 2, 1), sizes_of(4))
    assert plan.places == (0, 1, 2)
    assert plan.missing == {1: {layer(1), layer(2)}}
    assert plan.moves == ()


def test_too_few_places_are_refused() -> None:
    with pytest.raises(ValueError, match="2 stages for 1 places: start more actors"):
        plan_migration(cut(4), cut(2, 2), sizes_of(4))


def random_cut(layers: int, stages: int, dice: random.Random) -> tuple[frozenset[Piece], ...]:
    ends = sorted(dice.sample(range(1, layers), stages - 1))
    return cut(*(end - start for start, end in itertools.pairwise([0, *ends, layers])))


@pytest.mark.parametrize("seed", range(100))
def test_any_cut_into_any_other(seed: int) -> None:
    """Everything arrives once, nothing moves that is there, and no other pairing of stages and places moves less."""
    dice = random.Random(seed)
    layers = dice.randint(2, 9)
    before = list(random_cut(layers, dice.randint(1, min(4, layers)), dice))
    after = random_cut(layers, dice.randint(1, min(4, layers)), dice)
    before += [frozenset()] * max(0, len(after) - len(before))
    sizes = sizes_of(layers)
    plan = plan_migration(before, after, sizes)

    assert len(set(plan.places)) == len(after)
    assert not plan.missing
    arrived = {place: [piece for piece in before[place] if piece in after[s]] for s, place in enumerate(plan.places)}
    for move in plan.moves:
        assert move.source != move.target
        assert set(move.pieces) <= set(before[move.source])
        arrived[move.target] += move.pieces
    for stage, place in enumerate(plan.places):
        assert sorted(arrived[place], key=str) == sorted(after[stage], key=str)
    assert plan.moved == sum(sizes[piece] for move in plan.moves for piece in move.pieces)
    least = min(
        sum(sizes[piece] for stage, place in enumerate(places) for piece in after[stage] - before[place])
        for places in itertools.permutations(range(len(before)), len(after))
    )
    assert plan.moved == least


A, B = cut(2, 2)
WHOLE = A | B


@pytest.mark.parametrize(
    ("live", "kept", "step"),
    [
        ([(5, A), (5, B)], {}, 5),
        ([(5, A)], {}, None),
        ([(5, A)], {5: B, 4: WHOLE}, 5),
        # One has stepped, the other died before it did.
        ([(6, A)], {6: A, 5: WHOLE}, 5),
        ([(6, A)], {6: WHOLE, 5: WHOLE}, 6),
        # One has stepped, the other lives and has not.
        ([(6, A), (5, B)], {5: WHOLE}, 5),
        ([], {5: A, 4: WHOLE}, 4),
        ([], {5: A, 4: B}, None),
    ],
)
def test_the_last_step_of_which_all_is_there(live: object, kept: object, step: int | None) -> None:
    assert newest_complete(WHOLE, live, kept) == step  # type: ignore[arg-type]
