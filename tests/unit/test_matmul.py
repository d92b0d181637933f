"""Products on CPU are those of torch's `linear`, whoever multiplies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from ray_ministral.model import matmul
from ray_ministral.model.matmul import ENOUGH_TOKENS, PackedWeight, onednn_serves, product

CPU = torch.device("cpu")
SIZES = [(16, 32), (37, 29), (1, 5), (70, 1)]
"""Outputs and inputs of a weight."""

needs_onednn = pytest.mark.skipif(not onednn_serves(CPU, torch.float32), reason="this torch has no oneDNN")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Sums in another order; in bf16 also rounded at another place, before or after the bias."""
    tolerance = 0.03 if found.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (64,), (300,), (1, 1), (7, 1), (4, 16), (3, 100)])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_a_packed_weight_multiplies_like_linear(
    outputs: int, inputs: int, shape: tuple[int, ...], with_bias: bool, dtype: torch.dtype
) -> None:
    weight, x = normal(outputs, inputs, dtype=dtype), normal(*shape, inputs, dtype=dtype)
    bias = normal(outputs, dtype=dtype) if with_bias else None
    assert_close(PackedWeight(weight, bias)(x), linear(x, weight, bias))


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_packed_from_any_view(dtype: torch.dtype) -> None:
    weight, x = normal(29, 37, dtype=dtype).t(), normal(7, 29, dtype=dtype)
    assert_close(PackedWeight(weight)(x), linear(x, weight))


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_a_packed_weight_outlives_what_it_was_made_of(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight, x = normal(outputs, inputs, dtype=dtype), normal(7, inputs, dtype=dtype)
    expected = linear(x, weight)
    packed = PackedWeight(weight)
    weight.zero_()
    assert_close(packed(x), expected)


@needs_onednn
def test_a_parameter_is_packed_without_gradients() -> None:
    weight, bias = torch.nn.Parameter(normal(37, 29)), torch.nn.Parameter(normal(37))
    assert not PackedWeight(weight, bias)(normal(7, 29)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (7,), (ENOUGH_TOKENS - 1,), (ENOUGH_TOKENS,), (300,), (2, 3), (3, 100)])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_a_product_is_that_of_linear(outputs: int, inputs: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, x = normal(outputs, inputs, dtype=dtype), normal(*shape, inputs, dtype=dtype)
    assert_close(product(x, weight), linear(x, weight))


@pytest.mark.parametrize("tokens", [1, 7, ENOUGH_TOKENS, 300])
def test_a_product_with_a_transposed_view(tokens: int) -> None:
    weight, x = normal(37, 29), normal(tokens, 37)
    assert_close(product(x, weight.t()), x @ weight)


@pytest.mark.parametrize("tokens", [7, 300])
def test_a_product_sees_that_the_weight_has_changed(tokens: int) -> None:
    weight, x = normal(37, 29), normal(tokens, 29)
    before = product(x, weight)
    weight.mul_(2)
    assert_close(product(x, weight), 2 * before)


@pytest.mark.parametrize(
    ("tokens", "dtype", "available", "falls_back"),
    [
        pytest.param(ENOUGH_TOKENS, torch.float32, True, False, marks=needs_onednn),
        (ENOUGH_TOKENS - 1, torch.float32, True, True),
        (ENOUGH_TOKENS, torch.float64, True, True),
        (ENOUGH_TOKENS, torch.bfloat16, True, True),
        (ENOUGH_TOKENS, torch.float32, False, True),
    ],
)
def test_who_multiplies(
    tokens: int, dtype: torch.dtype, available: bool, falls_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def noted(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(x.shape)
        return linear(x, weight)

    monkeypatch.setattr(matmul, "linear", noted)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
    weight, x = normal(37, 29, dtype=dtype), normal(tokens, 29, dtype=dtype)
    assert_close(product(x, weight), linear(x, weight))
    assert bool(calls) is falls_back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onednn_serves_on_cpu_where_torch_has_it(dtype: torch.dtype) -> None:
    """Else all tests of packed weights would be skipped, and inference be slower, without a word."""
    assert onednn_serves(CPU, dtype) is torch.backends.mkldnn.is_available()


@pytest.mark.parametrize(
    ("device", "dtype"), [("cuda", torch.float32), ("cuda", torch.bfloat16), ("cpu", torch.float64)]
)
def test_onednn_does_not_serve(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert onednn_serves(torch.device(device), dtype) is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onednn_does_not_serve_where_torch_has_none(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert onednn_serves(CPU, dtype) is False
