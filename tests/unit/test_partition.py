"""A partition is contiguous, complete and has no empty stage; the balanced one is the best there is."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

import pytest

from ray_ministral.config import StageSpec
from ray_ministral.errors import ConfigError
from ray_ministral.model.architecture import Architecture, VisionArchitecture
from ray_ministral.pipeline.partition import Costs, Partition, Workload, stage_parameters

VISION = VisionArchitecture(
    num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_heads=16, patch_size=14, merge_size=2, image_size=1540
)
# As the hub's configs have them.
ARCH_3B = Architecture(
    num_layers=26,
    hidden_size=3072,
    ffn_hidden_size=9216,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=131072,
    max_positions=262144,
    tied_embeddings=True,
    vision=VISION,
)
ARCH_8B = dataclasses.replace(ARCH_3B, num_layers=34, hidden_size=4096, ffn_hidden_size=14336, tied_embeddings=False)
ARCH_14B = dataclasses.replace(ARCH_8B, num_layers=40, hidden_size=5120, ffn_hidden_size=16384)


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as `parts` positive numbers in order."""
    for cuts in itertools.combinations(range(1, total), parts - 1):
        edges = (0, *cuts, total)
        yield tuple(b - a for a, b in itertools.pairwise(edges))


def stage_costs(costs: Costs, split: Sequence[int]) -> list[float]:
    found, start = [], 0
    for count in split:
        found.append(sum(costs.layers[start : start + count]))
        start += count
    found[0] += costs.first
    found[-1] += costs.last
    return found


@pytest.mark.parametrize("seed", range(40))
def test_balanced_is_the_best_of_all_splits(seed: int) -> None:
    chance = random.Random(seed)
    num_layers = chance.randint(1, 9)
    costs = Costs(
        tuple(chance.randint(1, 20) for _ in range(num_layers)),
        chance.choice([0, chance.randint(0, 60)]),
        chance.choice([0, chance.randint(0, 60)]),
    )
    for stages in range(1, num_layers + 1):
        found = Partition.balanced(costs, stages)
        assert found.num_layers == num_layers
        assert len(found.stages) == stages
        best = min(max(stage_costs(costs, split)) for split in compositions(num_layers, stages))
        assert max(stage_costs(costs, found.layers_per_stage)) == best


@pytest.mark.parametrize("first", [0, 1.5, 4])
@pytest.mark.parametrize("last", [0, 1, 6])
def test_equal_layers_are_spread_evenly(first: float, last: float) -> None:
    for num_layers in range(1, 10):
        costs = Costs((1.0,) * num_layers, first, last)
        for stages in range(1, num_layers + 1):
            found = stage_costs(costs, Partition.balanced(costs, stages).layers_per_stage)
            every = [stage_costs(costs, split) for split in compositions(num_layers, stages)]
            dearest = min(max(each) for each in every)
            squares = min(sum(cost**2 for cost in each) for each in every if max(each) == dearest)
            assert (max(found), sum(cost**2 for cost in found)) == (dearest, squares)


def test_from_layers() -> None:
    partition = Partition.from_layers([3, 1, 2], 6)
    assert partition.layers_per_stage == (3, 1, 2)
    assert [list(stage.layers) for stage in partition.stages] == [[0, 1, 2], [3], [4, 5]]
    assert [(s.is_first, s.is_last) for s in partition.stages] == [(True, False), (False, False), (False, True)]
    only = Partition.from_layers([6], 6).stages[0]
    assert only.is_first
    assert only.is_last


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ([2, 0, 4], r"split \[2, 0, 4\] has an empty stage: every stage needs a layer, use fewer stages"),
        ([7, -1], "empty stage"),
        ([2, 3], r"split \[2, 3\] adds up to 5 layers, the model has 6: 1 too few"),
        ([4, 4], "adds up to 8 layers, the model has 6: 2 too many"),
        ([], "adds up to 0 layers, the model has 6: 6 too few"),
    ],
)
def test_a_split_that_does_not_fit(split: list[int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Partition.from_layers(split, 6)


@pytest.mark.parametrize("stages", [0, -1, 7])
def test_more_stages_than_layers(stages: int) -> None:
    with pytest.raises(ConfigError, match=rf"{stages} stages for 6 decoder layers: .* use --stages between 1 and 6"):
        Partition.balanced(Costs((1.0,) * 6, 0, 0), stages)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ((), "at least one stage, got none"),
        ((StageSpec(1, 2, True, True),), "stage 0 begins at layer 1, wanted 0"),
        ((StageSpec(0, 2, True, False), StageSpec(3, 4, False, True)), "stage 1 begins at layer 3, wanted 2"),
        ((StageSpec(0, 2, True, False), StageSpec(1, 4, False, True)), "stage 1 begins at layer 1, wanted 2"),
        (
            (StageSpec(0, 2, True, True), StageSpec(2, 4, False, True)),
            "stage 0 of 2 is marked is_first=True, is_last=True",
        ),
        ((StageSpec(0, 2, True, False), StageSpec(2, 4, True, True)), "stage 1 of 2 is marked is_first=True"),
        ((StageSpec(0, 2, True, False), StageSpec(2, 4, False, False)), "stage 1 of 2 is marked"),
        ((StageSpec(0, 2, False, True),), "stage 0 of 1 is marked is_first=False"),
    ],
)
def test_stages_that_are_no_pipeline(stages: tuple[StageSpec, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Partition(stages)


def test_vision_and_output_layer_count() -> None:
    """The first stage makes up for its vision tower, the last one for the logits of every new token."""
    for arch in (ARCH_3B, ARCH_8B, ARCH_14B):
        costs = Costs.from_flops(arch)
        assert costs.layers == (costs.layers[0],) * arch.num_layers
        assert costs.first > 0 < costs.last
        counts = Partition.balanced(costs, 4).layers_per_stage
        blind = Partition.balanced(dataclasses.replace(costs, first=0.0), 4).layers_per_stage
        assert counts[0] < max(counts[1:])
        assert counts[0] < blind[0]
        talkative = Costs.from_flops(arch, Workload(text_tokens=1, new_tokens=1000, image_side=28))
        counts = Partition.balanced(talkative, 4).layers_per_stage
        assert counts[3] < max(counts[:3])


def test_costs_by_hand() -> None:
    """With one image token, no text to speak of and one new token, counted anew from the shapes of the matrices."""
    arch = dataclasses.replace(
        ARCH_3B,
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=10,
        num_heads=4,
        num_kv_heads=2,
        head_dim=3,
        vocab_size=11,
        vision=dataclasses.replace(VISION, num_layers=1, hidden_size=6, ffn_hidden_size=7, patch_size=5, merge_size=2),
    )
    costs = Costs.from_flops(arch, Workload(image_side=10, text_tokens=2, new_tokens=1))
    tokens = 1 + 1 + 2 + 1  # image token, image end, text, new
    matrices = 8 * 12 + 2 * 8 * 6 + 12 * 8 + 3 * 8 * 10 + 2 * 8
    # Causal: a token sees half of the others on average; two products of 2 * tokens * head_dim FLOPs each.
    attention = 2 * (2 * tokens * tokens * 4 * 3) / 2
    assert costs.layers == (2 * matrices * tokens + attention,)
    assert costs.last == 2 * 8 * 11 * 1
    patches = 4
    tower = 3 * 25 * 6 + 6 + (4 * 36 + 3 * 6 * 7 + 2 * 6) + 6 + 6 * 24 + 6 * 8 + 8 * 8
    assert costs.first == 2 * tower * patches + 2 * (2 * patches * patches * 6)


@pytest.mark.parametrize(("arch", "billions"), [(ARCH_3B, 3.8), (ARCH_8B, 8.9), (ARCH_14B, 13.9)])
def test_parameters_of_the_published_sizes(arch: Architecture, billions: float) -> None:
    """3.4 + 0.4, 8.4 + 0.4 and 13.5 + 0.4 billion on the model cards (language model and vision encoder)."""
    whole = stage_parameters(arch, StageSpec(0, arch.num_layers, True, True))
    assert whole / 1e9 == pytest.approx(billions, abs=0.1)
    cut = sum(stage_parameters(arch, stage) for stage in Partition.balanced(Costs.from_flops(arch), 3).stages)
    assert cut - whole == (arch.embedding_parameters if arch.tied_embeddings else 0)
