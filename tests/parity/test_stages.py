"""Ladder C, for logits: two, three and four stages give the bits of one; and what a chunk refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ray_ministral.config import StageSpec
from ray_ministral.model.ministral3 import Ministral3Model
from ray_ministral.model.packed import PackedBatch
from ray_ministral.model.weights import load_chunk
from ray_ministral.pipeline.partition import Partition
from ray_ministral.pipeline.wire import from_wire, to_wire
from tests.parity.small_models import Row, mixed_rows, pad_rows

SPLITS = [(2, 2), (1, 3), (3, 1), (1, 1, 2), (2, 1, 1), (1, 1, 1, 1)]


def packed(rows: Sequence[Row]) -> PackedBatch:
    lengths = tuple(len(row.token_ids) for row in rows)
    return PackedBatch(
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        lengths=lengths,
        token_ids_T=torch.cat([row.token_ids for row in rows]),
        images=[image for row in rows for image in row.pixels],
    )


def later(batch: PackedBatch) -> PackedBatch:
    """What a stage that is not the first needs to know."""
    return PackedBatch(positions_T=batch.positions_T, lengths=batch.lengths)


def chain(folder: Any, split: Sequence[int], batch: PackedBatch, dtype: torch.dtype) -> torch.Tensor:
    """The batch through the stages, hidden states over the wire."""
    hidden: torch.Tensor | None = None
    with torch.no_grad():
        for spec in Partition.from_layers(split, sum(split)).stages:
            stage = load_chunk(folder, spec, dtype=dtype)
            if hidden is not None:
                stage.set_input_tensor(from_wire(to_wire(hidden), dtype, torch.device("cpu")))
            hidden = stage(packed=batch if spec.is_first else later(batch))
            assert hidden.dtype == dtype
    assert hidden is not None
    return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_packed_logits_are_the_same_bits(
    split: tuple[int, ...], tied: bool, dtype: torch.dtype, directory: Any
) -> None:
    batch = packed(mixed_rows())
    whole = chain(directory(tied=tied), (4,), batch, dtype)
    assert torch.isfinite(whole).all()
    assert torch.equal(chain(directory(tied=tied), split, batch, dtype), whole)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_plain_logits_and_loss_are_the_same_bits(split: tuple[int, ...], directory: Any) -> None:
    batch = pad_rows(mixed_rows(), "left")
    whole = load_chunk(directory())
    stages = [load_chunk(directory(), spec) for spec in Partition.from_layers(split, 4).stages]
    # A later stage is told how the rows are padded, and nothing of what is in them.
    padding = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    with torch.no_grad():
        for labels in (None, batch.labels):
            hidden = stages[0](**batch.arguments, labels=labels)
            assert hidden.shape == (int(batch.attention_mask.sum()), 1, 64)
            for stage in stages[1:]:
                stage.set_input_tensor(hidden)
                hidden = stage(**padding, labels=labels)
            assert torch.equal(hidden, whole(**batch.arguments, labels=labels))


def test_gradients_flow_through_set_input_tensor(directory: Any) -> None:
    batch = packed(mixed_rows())
    first, last = (load_chunk(directory(), spec) for spec in Partition.from_layers((2, 2), 4).stages)
    labels = batch.token_ids_T
    hidden = first(packed=batch)
    last.set_input_tensor(hidden)
    last(packed=later(batch), labels=labels).backward()
    whole = load_chunk(directory())
    whole(packed=batch, labels=labels).backward()
    expected = whole.language_model.decoder.layers[0].self_attention.linear_qkv.weight.grad
    assert expected.abs().max() > 0
    torch.testing.assert_close(first.language_model.decoder.layers[0].self_attention.linear_qkv.weight.grad, expected)


@pytest.fixture
def last_stage(directory: Any) -> Ministral3Model:
    return load_chunk(directory(), Partition.from_layers((2, 2), 4).stages[1])


def test_no_input_tensor(last_stage: Ministral3Model) -> None:
    batch = later(packed(mixed_rows()))
    with pytest.raises(ValueError, match=r"shape None, wanted \[\d+, 1, 64\]: call set_input_tensor"):
        last_stage(packed=batch)


def test_an_input_tensor_serves_once(last_stage: Ministral3Model) -> None:
    batch = later(packed(mixed_rows()))
    last_stage.set_input_tensor(torch.randn(batch.num_tokens, 1, 64))
    last_stage(packed=batch)
    with pytest.raises(ValueError, match="set_input_tensor"):
        last_stage(packed=batch)


@pytest.mark.parametrize(("more", "width"), [(1, 64), (-1, 64), (0, 32), (0, 65)])
def test_an_input_tensor_of_another_shape(more: int, width: int, last_stage: Ministral3Model) -> None:
    batch = later(packed(mixed_rows()))
    last_stage.set_input_tensor(torch.randn(batch.num_tokens + more, 1, width))
    with pytest.raises(ValueError, match="set_input_tensor"):
        last_stage(packed=batch)


def test_a_failed_forward_forgets_its_input(last_stage: Ministral3Model, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = later(packed(mixed_rows()))

    class Broken:
        def attend(self, *_: Any) -> torch.Tensor:
            raise RuntimeError("no attention today")

    last_stage.set_input_tensor(torch.randn(batch.num_tokens, 1, 64))
    with pytest.raises(RuntimeError, match="no attention today"):
        last_stage(packed=PackedBatch(batch.positions_T, batch.lengths, attention=Broken()))
    with pytest.raises(ValueError, match="set_input_tensor"):
        last_stage(packed=batch)


def test_vision_is_asked_of_the_first_stage_only(last_stage: Ministral3Model) -> None:
    assert not hasattr(last_stage, "vision_tower")
    assert not hasattr(last_stage, "multi_modal_projector")
    with pytest.raises(ValueError, match="stage 0"):
        last_stage.get_image_features(torch.zeros(1, 3, 28, 28))
    last_stage.freeze(False, True, True)  # what it does not hold is passed over
    assert all(parameter.requires_grad for parameter in last_stage.parameters())


def test_nothing_to_run_on(directory: Any) -> None:
    first = load_chunk(directory())
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        first()
    with pytest.raises(ValueError, match="token ids"):
        first(attention_mask=torch.ones(1, 3))


def test_layers_that_the_model_does_not_have(reference: Any) -> None:
    with pytest.raises(ValueError, match="layers 3 to 4, the model has 4"):
        Ministral3Model(reference().config, stage=StageSpec(3, 5, False, True))


def test_flags_without_a_stage_mean_all_layers(reference: Any) -> None:
    model = Ministral3Model(reference().config, pre_process=False, post_process=True, vp_stage=1)
    assert (model.pre_process, model.post_process, model.vp_stage) == (False, True, 1)
    assert len(model.language_model.decoder.layers) == 4
    assert not hasattr(model, "vision_tower")
