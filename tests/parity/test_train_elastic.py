"""Ladder E without Ray: the number of stages changes between two steps, and no bit of the curve or the weights does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ministral.config import OptimizerConfig
from ray_ministral.errors import PieceError
from ray_ministral.training.build import build_stage, rebuild_stage
from ray_ministral.training.lora import LoraOptions
from ray_ministral.training.migration import Piece
from ray_ministral.training.optimizer import Optimizer
from ray_ministral.training.pieces import PieceState, give, take
from tests.parity.test_mutations import assert_turns_red
from tests.parity.test_train_resume import assert_same_bits
from tests.parity.train_harness import Pipeline
from tests.parity.train_runs import CLIP_NORM, FOUR, INTERLEAVED, ONE, THREE, TWO, Layout, run

STEPS = 9
KINDS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "muon": {"tied": True, "optimizer": OptimizerConfig(name="muon")},
    "bf16": {"tied": True, "dtype": torch.bfloat16},
    "lora": {"lora": LoraOptions(3, alpha=12)},
    "frozen vision": {"freeze": (False, True, True)},
    "frozen language": {"freeze": (True, False, False)},
}


def everything(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """Weights, masters, moments and step counts by name."""
    found: dict[str, torch.Tensor] = {}
    for stage in pipeline.stages:
        for state in give(stage, list(_held(stage))).values():
            found.update({name: torch.from_numpy(array.copy()) for name, array in state.tensors.items()})
    return found


def _held(stage: Any) -> set[Piece]:
    from ray_ministral.training.migration import pieces_of

    return set(pieces_of([chunk.stage for chunk in stage.chunks.values()]))


def check(model_dir: Path, layouts: tuple[Layout, ...], **options: Any) -> None:
    """A third of the steps on each layout, and all on one: the same bits."""
    calm = TWO.pipeline(model_dir, **options)
    expected = run(calm, TWO, range(STEPS))
    pipeline = layouts[0].pipeline(model_dir, **options)
    curve, third = [], STEPS // len(layouts)
    for number, layout in enumerate(layouts):
        if number:
            pipeline.change(layout.chunk_layers, layout.num_stages)
        curve += run(pipeline, layout, range(number * third, (number + 1) * third))
    assert curve == expected
    ours, theirs = everything(pipeline), everything(calm)
    assert any(name.endswith("exp_avg") for name in ours)
    assert_same_bits(ours, theirs)


SLOW = ("muon", "frozen vision", "frozen language")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS]
)
def test_four_then_two_then_three_stages(kind: str, directory: Any) -> None:
    options = dict(KINDS[kind])
    check(directory(tied=options.pop("tied", False)), (FOUR, TWO, THREE), **options)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True], ids=["untied", "tied"])
def test_chunks_come_and_go(tied: bool, directory: Any) -> None:
    check(directory(tied=tied), (INTERLEAVED, ONE, FOUR), optimizer=OptimizerConfig(weight_decay=0.1))


def test_clipping_is_active(directory: Any) -> None:
    assert min(norm for _, norm in run(TWO.pipeline(directory()), TWO, range(STEPS))) > CLIP_NORM


@pytest.mark.parametrize("fault", ["moments that stay", "moments that move"])
def test_forgotten_moments_turn_the_comparison_red(fault: str, directory: Any) -> None:
    def stay(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Optimizer, "adopt", lambda self, other: None)

    def move(monkeypatch: pytest.MonkeyPatch) -> None:
        load = Optimizer.load_state
        monkeypatch.setattr(Optimizer, "load_state", lambda self, name, master, _: load(self, name, master, {}))

    mutation = stay if fault == "moments that stay" else move
    assert_turns_red(lambda: check(directory(), (FOUR, TWO, THREE)), mutation)


def test_what_stays_is_not_copied_and_nothing_is_read(directory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = TWO.pipeline(directory())
    run(pipeline, TWO, range(1))
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    weight = pipeline.stages[0].optimizer.parameters[name].data_ptr()
    moment = pipeline.stages[0].optimizer.state(name)["exp_avg"].data_ptr()
    monkeypatch.setattr("ray_ministral.training.build.load_chunk", lambda *_, **__: pytest.fail("a chunk was read"))
    plan = pipeline.change((1, 3), 2)
    assert [move.pieces for move in plan.moves] == [(Piece("layer", 1), Piece("layer", 2))]
    assert pipeline.stages[0].optimizer.parameters[name].data_ptr() == weight
    assert pipeline.stages[0].optimizer.state(name)["exp_avg"].data_ptr() == moment


def test_a_damaged_piece_is_refused(directory: Any) -> None:
    pipeline = TWO.pipeline(directory())
    moved = [Piece("layer", 2)]
    parcel = give(pipeline.stages[0], moved)
    state = parcel[moved[0]]
    name = "model.language_model.layers.2.mlp.down_proj.weight"
    other = state.tensors[name].copy()
    other[0, 0] += 1
    damaged = {moved[0]: PieceState(state.tensors | {name: other}, state.checksum)}
    own = pipeline.options((2, 2), 2)[1]
    with pytest.raises(PieceError, match="layer 2 came with other bytes than it was sent with"):
        rebuild_stage(pipeline.stages[1], own, [damaged], "a test")
    with pytest.raises(PieceError, match="layer 2 was not sent"):
        rebuild_stage(pipeline.stages[1], own, [], "a test")


def test_copies_leave_out_what_is_frozen_and_it_is_read_again(directory: Any) -> None:
    """A stage with adapters is lost: its neighbour takes the copy of the adapters, and reads the weights below them."""
    model_dir = directory()
    pipeline = TWO.pipeline(model_dir, lora=LoraOptions(3))
    run(pipeline, TWO, range(2))
    expected = everything(pipeline)
    copy = give(pipeline.stages[1], checked=False)
    assert all("lora" in name for state in copy.values() for name in state.tensors)
    stage = rebuild_stage(pipeline.stages[0], pipeline.options((4,), 1)[0], [copy], "a test")
    pipeline.stages = [stage]
    assert_same_bits(everything(pipeline), expected)

    # And by a new actor, which has read all of them anyway.
    fresh = build_stage(dataclasses.replace(pipeline.options((4,), 1)[0]))
    take(fresh, set(copy), [copy], "a test")
    assert_same_bits(
        {name: tensor for name, tensor in _tensors(give(fresh, set(copy))).items() if "lora" in name},
        {name: tensor for name, tensor in expected.items() if name in _tensors(copy)},
    )


def _tensors(parcel: Any) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(a.copy()) for state in parcel.values() for name, a in state.tensors.items()}
