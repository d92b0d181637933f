"""Where training cuts a model: by what its samples cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ray_ministral.model.architecture import Architecture
from ray_ministral.pipeline.partition import Partition
from ray_ministral.training.costs import training_costs
from ray_ministral.training.targets import TrainSample
from tests.parity.small_models import small_config

TOKENS = 40


@pytest.fixture(scope="module")
def arch() -> Architecture:
    found = Architecture.from_config(small_config(layers=8))
    return replace(found, vocab_size=12 * found.layer_parameters // found.hidden_size // 8)


def sample(targets: int, *images: tuple[int, int]) -> TrainSample:
    token_ids = np.zeros(TOKENS, dtype=np.int32)
    wanted = np.full(TOKENS, -100, dtype=np.int32)
    wanted[:targets] = 1
    values: dict[str, Any] = {"token_ids": token_ids, "targets": wanted, "image_sizes": images, "prompt_tokens": 1}
    return TrainSample(**values)


def layers(arch: Architecture, samples: list[TrainSample], **options: Any) -> tuple[int, ...]:
    return Partition.balanced(training_costs(arch, samples, **options), 2).layers_per_stage


def test_the_output_layer_costs_what_is_learnt(arch: Architecture) -> None:
    assert layers(arch, [sample(1)]) == (4, 4)
    first, last = layers(arch, [sample(TOKENS)])
    assert first > last


def test_images_cost_the_first_stage(arch: Architecture) -> None:
    first, last = layers(arch, [sample(1, (140, 140))])
    assert first < last


def test_a_frozen_tower_costs_a_third(arch: Architecture) -> None:
    whole, frozen = (
        training_costs(arch, [sample(1, (140, 140))], freeze).first for freeze in ((), ("vision", "projector"))
    )
    assert whole == pytest.approx(3 * frozen)


def test_weights_that_are_not_trained_cost_two_thirds(arch: Architecture) -> None:
    whole = training_costs(arch, [sample(3)])
    for options in ({"freeze": ("language",)}, {"adapters": True}):
        part = training_costs(arch, [sample(3)], **options)  # type: ignore[arg-type]
        assert part.last == pytest.approx(whole.last * 2 / 3)
        assert part.layers[0] < whole.layers[0]
