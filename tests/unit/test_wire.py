"""Activations survive the wire to the bit, without copies where there need be none."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch

from ray_ministral.pipeline.wire import from_wire, to_wire

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def sent(array: np.ndarray) -> np.ndarray:
    """Through pickle and read-only, as out of an object store."""
    received: np.ndarray = pickle.loads(pickle.dumps(array, protocol=5))  # noqa: S301 our own
    received.flags.writeable = False
    return received


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 1, 8), (1, 1, 1), (0, 1, 8), (3,)])
def test_round_trip(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = from_wire(sent(to_wire(tensor)), dtype, CPU)
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), torch.finfo(dtype).tiny]).to(dtype)
    back = from_wire(sent(to_wire(tensor)), dtype, CPU)
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    assert torch.equal(back.view(bits), tensor.view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_that_are_not_contiguous(dtype: torch.dtype) -> None:
    tensor = torch.randn(6, 1, 8).to(dtype)
    for view in (tensor[::2], tensor.transpose(0, 2), tensor[..., 3:5]):
        array = to_wire(view)
        assert array.flags["C_CONTIGUOUS"]
        assert torch.equal(from_wire(array, dtype, CPU), view)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_copied_on_the_cpu(dtype: torch.dtype) -> None:
    tensor = torch.randn(4, 1, 8).to(dtype)
    array = to_wire(tensor)
    assert array.ctypes.data == tensor.data_ptr() == from_wire(array, dtype, CPU).data_ptr()
    assert array.itemsize == tensor.element_size()


def test_gradients_and_inference_tensors() -> None:
    assert to_wire(torch.ones(2, requires_grad=True)).tolist() == [1, 1]
    with torch.inference_mode():
        made = torch.ones(2) * 2
    assert to_wire(made).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("sender", "receiver"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_stages_of_different_dtypes(sender: torch.dtype, receiver: torch.dtype) -> None:
    array = to_wire(torch.ones(2, 1, 8, dtype=sender))
    with pytest.raises(TypeError, match="all stages must run with one --dtype"):
        from_wire(array, receiver, CPU)
