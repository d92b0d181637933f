"""Ladder G, for inference: each mutation must turn the comparison with Hugging Face red, or the ladder proves nothing.

The checks are those of the other rungs, made small: they pass as the code is, and fail with one thing broken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from ray_ministral.captioning import kv_cache
from ray_ministral.captioning import plan as plan_module
from ray_ministral.captioning.kv_cache import CachedAttention, KVCache
from ray_ministral.captioning.plan import StepPlan
from ray_ministral.captioning.stage import CaptionStage
from ray_ministral.data.images import ImagePreprocessor
from ray_ministral.model import attention, rope, vision
from ray_ministral.model.ministral3 import Ministral3Model
from ray_ministral.model.packed import PackedBatch
from ray_ministral.model.rope import Rotary, RotaryTables
from ray_ministral.model.weights import TensorSlot, load_chunk
from tests.parity.caption_runs import caption, generate, margins, until_stop
from tests.parity.small_models import mixed_rows, pad_rows

Mutation = Callable[[pytest.MonkeyPatch], None]


@contextmanager
def mutated(mutation: Mutation) -> Iterator[None]:
    """Within, the code is broken in one place."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        mutation(monkeypatch)
        yield


def assert_turns_red(check: Callable[[], None], mutation: Mutation) -> None:
    """`check` passes, fails (by an assertion, not by a crash) while mutated, and passes again."""
    check()
    with mutated(mutation), pytest.raises(AssertionError):
        check()
    check()


# Mutations


def replace_positions(monkeypatch: pytest.MonkeyPatch, change: Callable[[StepPlan, np.ndarray], np.ndarray]) -> None:
    positions = StepPlan.positions
    monkeypatch.setattr(StepPlan, "positions", lambda plan: change(plan, positions(plan)))


def decode_at_position_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(plan: StepPlan, positions: np.ndarray) -> np.ndarray:
        positions[: plan.num_decode] = 0
        return positions

    replace_positions(monkeypatch, change)


def decode_one_position_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(plan: StepPlan, positions: np.ndarray) -> np.ndarray:
        positions[: plan.num_decode] += 1
        return positions

    replace_positions(monkeypatch, change)


def query_scale_of_position_0(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = Rotary.tables
    monkeypatch.setattr(
        Rotary,
        "tables",
        lambda self, positions, dtype: dataclasses.replace(
            tables(self, positions, dtype), scale_T=tables(self, positions * 0, dtype).scale_T
        ),
    )


def query_scale_of_position_0_in_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts right, new tokens wrong: what comes of counting positions from the first token of a step."""
    tables = Rotary.tables

    def broken(self: Rotary, positions: torch.Tensor, dtype: torch.dtype) -> RotaryTables:
        made = tables(self, positions, dtype)
        assert made.scale_T is not None
        prompts = (positions == 0).nonzero()
        made.scale_T[: int(prompts[0]) if len(prompts) else len(positions)] = 1
        return made

    monkeypatch.setattr(Rotary, "tables", broken)


def scale_keys_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = RotaryTables.rotate
    monkeypatch.setattr(
        RotaryTables,
        "rotate",
        lambda self, x: rotate(self, x) if self.scale_T is None else rotate(self, x) * self.scale_T.view(-1, 1, 1),
    )


def no_yarn(monkeypatch: pytest.MonkeyPatch) -> None:
    init = Rotary.__init__

    def broken(self: Rotary, config: Any) -> None:
        init(self, config)
        theta, dim = config.text_config.rope_parameters["rope_theta"], config.text_config.head_dim
        self.inv_freq = 1 / theta ** (torch.arange(0, dim, 2) / dim)

    monkeypatch.setattr(rope.Rotary, "__init__", broken)


def drop_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = KVCache.prepare
    monkeypatch.setattr(KVCache, "prepare", lambda self, plan: prepare(self, dataclasses.replace(plan, moves=())))


def move_into_the_wrong_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two sequences move, each goes where the other should."""
    prepare = KVCache.prepare

    def broken(self: KVCache, plan: StepPlan) -> None:
        sources, targets = [move[0] for move in plan.moves], [move[1] for move in plan.moves]
        prepare(self, dataclasses.replace(plan, moves=tuple(zip(sources, targets[::-1], strict=True))))

    monkeypatch.setattr(KVCache, "prepare", broken)


def leave_behind_what_outgrows_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that moves to the next bank finds it empty."""
    prepare = KVCache.prepare

    def broken(self: KVCache, plan: StepPlan) -> None:
        before = {slot: self.place(slot)[0] for slot in range(plan.num_decode) if slot in self._places}
        prepare(self, plan)
        for slot, capacity in before.items():
            if not plan.moves and self.place(slot)[0] > capacity:
                for layer in range(len(self.banks[self.place(slot)[0]].layers)):
                    self.row(layer, slot).zero_()

    monkeypatch.setattr(KVCache, "prepare", broken)


def mix_up_the_banks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the banks give stays in their order."""
    init = CachedAttention.__init__

    def broken(self: CachedAttention, *arguments: Any) -> None:
        init(self, *arguments)
        self._back_N = None

    monkeypatch.setattr(CachedAttention, "__init__", broken)


def forget_the_length_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made = kv_cache._decoding
    monkeypatch.setattr(kv_cache, "_decoding", lambda *given: dataclasses.replace(made(*given), mask_NP=None))


def sample_a_row_early(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = StepPlan.sampled_rows
    monkeypatch.setattr(
        StepPlan, "sampled_rows", lambda plan: np.where(rows(plan) >= plan.num_decode, rows(plan) - 1, rows(plan))
    )


def swap_the_normalisation_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = ImagePreprocessor.normalisation_table
    monkeypatch.setattr(ImagePreprocessor, "normalisation_table", lambda self: np.ascontiguousarray(table(self)[::-1]))


def turn_images_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns of the vision positions swapped."""
    cartesian = torch.cartesian_prod
    monkeypatch.setattr(vision.torch, "cartesian_prod", lambda *axes: cartesian(*axes).flip(-1))


def neighbours_see_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sequences of the stream as one."""
    monkeypatch.setattr(attention, "equal_length_runs", lambda lengths: iter([(slice(0, sum(lengths)), 1)]))


def query_heads_by_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of query, key and value dealt out to the groups one by one in place of block by block."""
    monkeypatch.setattr(TensorSlot, "read", lambda self, values: self.region(values).transpose(0, 1).flatten(0, 1))
    monkeypatch.setattr(
        TensorSlot,
        "write",
        lambda self, tensor: self.region(self.parameter.data).copy_(
            tensor.unflatten(0, (-1, self.groups)).transpose(0, 1)
        ),
    )


def features_of_the_layer_before(monkeypatch: pytest.MonkeyPatch) -> None:
    run_tower = vision._run_tower
    monkeypatch.setattr(vision, "_run_tower", lambda tower, pixels, layer: run_tower(tower, pixels, layer - 1))


def labels_unshifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_ministral.model.ministral3._shift_left", lambda values, fill: values)


def detached_images(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Ministral3Model.get_image_features
    monkeypatch.setattr(
        Ministral3Model, "get_image_features", lambda self, *given: tuple(f.detach() for f in features(self, *given))
    )


# Checks


@pytest.fixture(scope="module")
def captions_agree(reference: Any, directory: Any) -> Callable[[], None]:
    """H in small: few rows a microbatch, two stages, captions of different lengths, slots reused, small blocks."""
    rows = [row for turn in (10, 11) for row in mixed_rows(turn)]
    free = generate(reference(), rows)
    stop_ids = [free[0][2], free[4][5]]
    expected = [until_stop(ids, stop_ids) for ids in free]
    assert margins(reference(), rows, free) > 1e-4

    def check() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan_module, "BLOCK_TOKENS", 8)
            run = caption(directory(), rows, split=(1, 3), rows_per_microbatch=6, stop_ids=stop_ids, microbatches=3)
        assert run.captions == expected
        assert max(len(plan.moves) for plan in run.plans) > 1

    return check


@pytest.mark.parametrize(
    "mutation",
    [
        decode_at_position_0,
        decode_one_position_late,
        query_scale_of_position_0,
        query_scale_of_position_0_in_decode,
        scale_keys_too,
        no_yarn,
        drop_moves,
        move_into_the_wrong_slot,
        leave_behind_what_outgrows_its_block,
        mix_up_the_banks,
        forget_the_length_mask,
        sample_a_row_early,
        swap_the_normalisation_table,
        turn_images_round,
        query_heads_by_stride,
        features_of_the_layer_before,
    ],
)
def test_captions_notice(mutation: Mutation, captions_agree: Callable[[], None]) -> None:
    assert_turns_red(captions_agree, mutation)


def test_captions_notice_swapped_images(reference: Any, directory: Any) -> None:
    """Two images of one size in one row: swapped, everything fits and the caption is another."""
    row = next(row for row in mixed_rows() if len(row.images) == 3)
    assert row.images[0].shape == row.images[1].shape
    expected = generate(reference(), [row])

    def swap_two(monkeypatch: pytest.MonkeyPatch) -> None:
        images = CaptionStage._images

        def swapped(self: CaptionStage, *arguments: Any) -> list[torch.Tensor]:
            found = images(self, *arguments)
            return [found[1], found[0], *found[2:]] if found else found

        monkeypatch.setattr(CaptionStage, "_images", swapped)

    def check() -> None:
        assert caption(directory(), [row]).captions == expected

    assert_turns_red(check, swap_two)


@pytest.mark.parametrize(
    "mutation",
    [query_scale_of_position_0, no_yarn, neighbours_see_one_another, turn_images_round, query_heads_by_stride],
)
def test_logits_notice(mutation: Mutation, reference: Any, directory: Any) -> None:
    batch = pad_rows(mixed_rows())
    mask = batch.attention_mask.bool()
    with torch.no_grad():
        expected = reference()(**batch.arguments).logits[mask]

    def check() -> None:
        with torch.no_grad():
            logits = load_chunk(directory())(**batch.arguments)[mask]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)

    assert_turns_red(check, mutation)


@pytest.mark.parametrize("mutation", [labels_unshifted, detached_images])
def test_gradients_notice(mutation: Mutation, reference: Any, directory: Any) -> None:
    from tests.parity.test_chunk import assert_gradients_equal, gradients, reference_gradients, run_backward

    batch = pad_rows(mixed_rows())
    theirs = reference()
    try:
        run_backward(theirs, batch)
        expected = {name: gradient.clone() for name, gradient in reference_gradients(theirs).items()}
    finally:
        theirs.zero_grad()

    def check() -> None:
        model = load_chunk(directory())
        run_backward(model, batch)
        assert_gradients_equal(gradients(model), expected)

    assert_turns_red(check, mutation)


def test_a_packed_batch_notices_positions_that_run_on(reference: Any, directory: Any) -> None:
    """Positions counted through the stream in place of anew in each sequence."""
    rows = mixed_rows()
    rows = [row for row in rows if not row.images]
    with torch.no_grad():
        expected = torch.cat([reference()(input_ids=row.token_ids[None]).logits[0] for row in rows])
    lengths = tuple(len(row.token_ids) for row in rows)
    ids = torch.cat([row.token_ids for row in rows])
    model = load_chunk(directory())

    def difference(positions: torch.Tensor) -> float:
        with torch.no_grad():
            logits = model(packed=PackedBatch(positions_T=positions, lengths=lengths, token_ids_T=ids))
        return float((logits - expected).abs().max())

    assert difference(torch.cat([torch.arange(length) for length in lengths])) < 2e-5
    assert difference(torch.arange(len(ids))) > 1e-3
