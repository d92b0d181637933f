"""How a model is cut into stages: contiguous, complete, none empty, as even as the costs allow. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_ministral.config import StageSpec
from ray_ministral.errors import ConfigError
from ray_ministral.model.architecture import Architecture


@dataclass(frozen=True)
class Workload:
    """What one request costs: its image (a square of `image_side` pixels), text tokens and generated tokens."""

    image_side: int = 448
    text_tokens: int = 32
    new_tokens: int = 64


@dataclass(frozen=True)
class Costs:
    """Cost of each decoder layer, and of what the first and the last stage have besides: in FLOPs, or in seconds."""

    layers: tuple[float, ...]
    first: float
    last: float

    @classmethod
    def from_flops(cls, arch: Architecture, workload: Workload | None = None) -> Costs:
        """FLOPs of one request: two for each parameter and token, plus the attention products."""
        work = workload or Workload()
        vision = arch.vision
        side = max(1, min(work.image_side, vision.image_size) // vision.merged_patch_size)
        image_tokens = side * side
        patches = image_tokens * vision.merge_size**2
        tokens = image_tokens + side + work.text_tokens + work.new_tokens
        layers = (layer_flops(arch, tokens),) * arch.num_layers
        return cls(layers, tower_flops(arch, patches), 2.0 * arch.embedding_parameters * work.new_tokens)


def tower_flops(arch: Architecture, patches: int) -> float:
    """FLOPs of the vision tower and projector for one image."""
    vision = arch.vision
    return 2.0 * arch.vision_parameters * patches + 4.0 * patches**2 * vision.hidden_size * vision.num_layers


def layer_flops(arch: Architecture, tokens: int) -> float:
    """FLOPs of one decoder layer for a sequence of so many tokens, from its first one on."""
    return 2.0 * arch.layer_parameters * tokens + 2.0 * tokens**2 * arch.num_heads * arch.head_dim


@dataclass(frozen=True)
class Partition:
    """The stages of one pipeline, first to last."""

    stages: tuple[StageSpec, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("a partition needs at least one stage, got none")
        last = len(self.stages) - 1
        expected = 0
        for index, stage in enumerate(self.stages):
            if stage.first_layer != expected:
                raise ConfigError(
                    f"stage {index} begins at layer {stage.first_layer}, wanted {expected}: stages must follow one "
                    "another without a gap or an overlap"
                )
            if stage.is_first != (index == 0) or stage.is_last != (index == last):
                raise ConfigError(
                    f"stage {index} of {last + 1} is marked is_first={stage.is_first}, is_last={stage.is_last}"
                )
            expected = stage.end_layer

    @property
    def num_layers(self) -> int:
        """Decoder layers of all stages."""
        return self.stages[-1].end_layer

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        """Decoder layers of each stage."""
        return tuple(len(stage.layers) for stage in self.stages)

    def shares(self, costs: Costs) -> tuple[float, ...]:
        """The fraction of the whole cost that each stage has."""
        each = [sum(costs.layers[stage.first_layer : stage.end_layer]) for stage in self.stages]
        each[0] += costs.first
        each[-1] += costs.last
        return tuple(cost / sum(each) for cost in each)

    @classmethod
    def from_layers(cls, layers_per_stage: Sequence[int], num_layers: int) -> Partition:
        """The split given layer by layer; `ConfigError` unless it holds every layer once and no stage is empty."""
        counts = tuple(layers_per_stage)
        if any(count < 1 for count in counts):
            raise ConfigError(f"split {list(counts)} has an empty stage: every stage needs a layer, use fewer stages")
        if sum(counts) != num_layers:
            few_or_many = "few" if sum(counts) < num_layers else "many"
            raise ConfigError(
                f"split {list(counts)} adds up to {sum(counts)} layers, the model has {num_layers}: "
                f"{abs(num_layers - sum(counts))} too {few_or_many}"
            )
        stages, start = [], 0
        for index, count in enumerate(counts):
            stages.append(StageSpec(start, start + count, index == 0, index == len(counts) - 1))
            start += count
        return cls(tuple(stages))

    @classmethod
    def balanced(cls, costs: Costs, num_stages: int) -> Partition:
        """The split whose dearest stage is cheapest; of equal layers, the most even one of these."""
        num_layers = len(costs.layers)
        if not 1 <= num_stages <= num_layers:
            raise ConfigError(
                f"{num_stages} stages for {num_layers} decoder layers: every stage needs a layer, "
                f"use --stages between 1 and {num_layers}"
            )
        prefix = [0.0]
        for cost in costs.layers:
            prefix.append(prefix[-1] + cost)

        def stage_cost(index: int, start: int, end: int) -> float:
            extra = (costs.first if index == 0 else 0.0) + (costs.last if index == num_stages - 1 else 0.0)
            return prefix[end] - prefix[start] + extra

        # best[end]: (dearest stage, sum of squares, layer counts) of the stages so far over layers 0 to end - 1
        best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
        for index in range(num_stages):
            remaining = num_stages - 1 - index
            longer: dict[int, tuple[float, float, tuple[int, ...]]] = {}
            for start, (dearest, squares, counts) in best.items():
                for end in range(start + 1, num_layers - remaining + 1):
                    cost = stage_cost(index, start, end)
                    candidate = (max(dearest, cost), squares + cost * cost, (*counts, end - start))
                    if end not in longer or candidate < longer[end]:
                        longer[end] = candidate
            best = longer
        return cls.from_layers(best[num_layers][2], num_layers)


def stage_parameters(arch: Architecture, stage: StageSpec) -> int:
    """Parameters that a stage holds; a tied output layer on a stage of its own is a copy and counts."""
    count = len(stage.layers) * arch.layer_parameters
    if stage.is_first:
        count += arch.vision_parameters + arch.embedding_parameters
    if stage.is_last:
        count += arch.hidden_size
        if not (stage.is_first and arch.tied_embeddings):
            count += arch.embedding_parameters
    return count
