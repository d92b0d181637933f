"""The two factors of an optimizer step: clipping, and the learning rate."""

from __future__ import annotations

import math

import pytest
import torch

from ray_ministral.errors import ConfigError, DivergedError
from ray_ministral.training.rates import LearningRate, clip_scale, global_norm


@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 5.0, 100.0, math.inf])
def test_clipping_is_torchs(clip_norm: float) -> None:
    generator = torch.Generator().manual_seed(1)
    parameters = {name: torch.nn.Parameter(torch.zeros(7, 3)) for name in "cab"}
    gradients = {name: torch.randn(7, 3, generator=generator) for name in parameters}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    theirs = torch.nn.utils.clip_grad_norm_(parameters.values(), clip_norm)
    norm = global_norm({name: float(gradient.norm()) ** 2 for name, gradient in gradients.items()})
    assert norm == pytest.approx(float(theirs), rel=1e-6)
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name] * clip_scale(norm, clip_norm), parameter.grad)


def test_a_small_gradient_is_left_alone_to_the_bit() -> None:
    assert clip_scale(0.3, 0.5) == 1
    assert clip_scale(0.0, 0.5) == 1
    assert clip_scale(1e30, None) == 1


def test_norms_are_added_in_the_order_of_names() -> None:
    squares = {"a": 1e16, "b": 1.0, "c": 1.0}  # from a on the ones are lost, from c on they are not
    assert global_norm(squares) == global_norm(dict(reversed(squares.items())))


@pytest.mark.parametrize("clip_norm", [1.0, None])
@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_no_step(norm: float, clip_norm: float | None) -> None:
    with pytest.raises(DivergedError, match=rf"is {norm}; the step was not taken.*lower --learning-rate"):
        clip_scale(norm, clip_norm)


def test_the_learning_rate_by_hand() -> None:
    warmup = LearningRate(8.0, warmup_steps=4)
    assert [warmup.at(step) for step in range(6)] == [2, 4, 6, 8, 8, 8]
    linear = LearningRate(8.0, warmup_steps=2, total_steps=6, schedule="linear")
    assert [linear.at(step) for step in range(7)] == [4, 8, 8, 6, 4, 2, 0]
    cosine = LearningRate(8.0, total_steps=4, schedule="cosine")
    assert [cosine.at(step) for step in range(6)] == pytest.approx(
        [8 * (1 + math.cos(math.pi * min(step, 4) / 4)) / 2 for step in range(6)]
    )
    assert LearningRate(8.0, warmup_steps=4, total_steps=4, schedule="cosine").at(3) == 8
    with pytest.raises(ConfigError, match="cosine needs an end: give --steps or --epochs"):
        LearningRate(1.0, schedule="cosine")
