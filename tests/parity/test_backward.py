"""Backward passes that are written by hand against autograd's of the plain formula, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ray_ministral.model.gradients import GradientAccumulator
from ray_ministral.model.ministral3 import Ministral3Model
from ray_ministral.model.rope import RotaryTables
from ray_ministral.model.swiglu import swiglu
from tests.parity.small_models import small_config


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_swiglu() -> None:
    gate_up = random(5, 1, 12).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, gate_up)
    gate, up = gate_up.chunk(2, -1)
    assert swiglu(gate_up).equal(torch.nn.functional.silu(gate) * up)
    with torch.no_grad():
        assert swiglu(gate_up).equal(torch.nn.functional.silu(gate) * up)


def test_rotation() -> None:
    tables = RotaryTables(random(4, 6).cos(), random(4, 6).sin(), None)
    heads = random(4, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(tables.rotate, heads)
    with torch.no_grad():
        plain = tables.rotate(heads)
    assert tables.rotate(heads).equal(plain)


@pytest.fixture
def chunk() -> Ministral3Model:
    torch.manual_seed(0)
    return Ministral3Model(small_config(), dtype=torch.float32, initialize=True)


def main_grads(model: Ministral3Model) -> dict[str, Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[attr-defined]


def test_gradients_are_overwritten_then_added_up(chunk: Ministral3Model) -> None:
    """Two passes are the sum of both, whatever stood there before; a parameter that got nothing ends at zero."""
    accumulator = GradientAccumulator(chunk)
    token_ids = torch.tensor([[20, 21, 22, 20, 23]])
    parameters: dict[str, Any] = dict(chunk.named_parameters())

    def passes(*chosen: int) -> dict[str, Tensor]:
        accumulator.reset()
        for start in chosen:
            chunk(input_ids=token_ids[:, start : start + 4], labels=token_ids[:, start : start + 4]).backward()
        accumulator.finish()
        return main_grads(chunk)

    for parameter in parameters.values():
        parameter.main_grad.fill_(float("nan"))
    first, second, both = passes(0), passes(1), passes(0, 1)
    for name in parameters:
        assert both[name].isfinite().all(), name
        torch.testing.assert_close(both[name], first[name] + second[name], rtol=1e-4, atol=1e-7)
        if "vision_tower" in name or "projector" in name:
            assert not both[name].any(), name
        elif "word_embeddings" in name:
            touched = both[name].any(dim=1).nonzero().flatten().tolist()
            assert touched == [20, 21, 22]  # the last token predicts nothing
        else:
            assert first[name].any(), name


def test_embedding_rows_that_repeat_add_up(chunk: Ministral3Model) -> None:
    weight: Any = chunk.language_model.embedding.word_embeddings.weight
    token_ids = torch.tensor([[20, 20, 21, 20]])
    plain = torch.nn.functional.embedding(token_ids, nn.Parameter(weight.detach().clone()))
    accumulator = GradientAccumulator(chunk)
    embedded = chunk.language_model.embedding.word_embeddings(token_ids)
    assert embedded.equal(plain)
    accumulator.reset()
    embedded.backward(torch.arange(1.0, 5.0).view(1, 4, 1).expand_as(embedded).contiguous())
    accumulator.finish()
    assert weight.main_grad[20].eq(1 + 2 + 4).all()
    assert weight.main_grad[21].eq(3).all()
