"""Packed batches and padding: what belongs together, and what is refused."""

from __future__ import annotations

import pytest
import torch

from ray_ministral.model.packed import PackedBatch, Padding

CPU = torch.device("cpu")


def test_a_batch_that_adds_up() -> None:
    batch = PackedBatch(positions_T=torch.tensor([0, 1, 2, 0]), lengths=(3, 1))
    assert batch.num_tokens == 4
    assert batch.prompt_start == 0
    assert batch.images == ()


@pytest.mark.parametrize("lengths", [(3,), (3, 2), (4, 0), (5, -1), ()])
def test_lengths_that_do_not_add_up(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be positive and add up to the 4 tokens"):
        PackedBatch(positions_T=torch.arange(4), lengths=lengths)


def test_ids_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"token_ids \(3,\) and positions \(4,\)"):
        PackedBatch(positions_T=torch.arange(4), lengths=(4,), token_ids_T=torch.arange(3))


def test_padding_on_either_side() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    padding = Padding.of((4, 4), mask, CPU)
    assert padding.lengths == (2, 1, 4), "a row of padding is no sequence"
    values = torch.arange(16).view(4, 4)
    packed = padding.pack(values)
    assert packed.tolist() == [0, 1, 7, 8, 9, 10, 11]
    assert torch.equal(padding.unpack(packed), values * mask)


def test_more_dimensions() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    padding = Padding.of((2, 3), mask, CPU)
    values = torch.randn(2, 3, 5, requires_grad=True)
    packed = padding.pack(values)
    assert packed.shape == (3, 5)
    back = padding.unpack(packed)
    assert torch.equal(back, values * mask[..., None])
    back.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, mask[..., None].expand(2, 3, 5).float())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    assert Padding.of((1, 3), torch.tensor([[1, 1, 0]]).to(dtype), CPU).lengths == (2,)


def test_no_mask_means_no_padding() -> None:
    assert Padding.of((2, 3), None, CPU).lengths == (3, 3)


@pytest.mark.parametrize("row", [[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 1]])
def test_holes_are_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match="holes"):
        Padding.of((2, 4), torch.tensor([[1, 1, 1, 1], row]), CPU)


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (2, 1, 3, 3)])
def test_a_mask_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"wanted the shape of the batch, \(2, 3\)"):
        Padding.of((2, 3), torch.ones(shape), CPU)
