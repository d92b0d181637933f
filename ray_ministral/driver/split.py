"""`Split`: where the model is cut, and why there: as the user said, as the stages measured, or by counting FLOPs.

Knows neither Ray nor stages; `profiling` asks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ray_ministral.captioning.costs import Profile, Shapes, costs_of
from ray_ministral.config import PipelineConfig
from ray_ministral.model.architecture import Architecture
from ray_ministral.pipeline.partition import Costs, Partition

SplitBy = Literal["given", "measured", "flops"]


@dataclass(frozen=True)
class Split:
    """A partition, the costs of its layers and ends that are expected, and who has chosen it.

    by: `given` by the user (or there is one stage, and no choice), `measured`, or `flops`.
    """

    partition: Partition
    costs: Costs
    by: SplitBy

    @classmethod
    def before_measuring(cls, config: PipelineConfig, arch: Architecture) -> Split:
        """What is known without any stage. Raises `ConfigError` where it cannot be."""
        costs = Costs.from_flops(arch)
        if config.layers_per_stage is not None:
            return cls(Partition.from_layers(config.layers_per_stage, arch.num_layers), costs, "given")
        return cls(Partition.balanced(costs, config.stages), costs, "given" if config.stages == 1 else "flops")

    @property
    def is_to_be_measured(self) -> bool:
        """Nobody has said where to cut, and there is a choice."""
        return self.by == "flops"

    @property
    def shares(self) -> tuple[float, ...]:
        """The fraction of all work that each stage is expected to have."""
        return self.partition.shares(self.costs)

    def measured(self, profiles: Sequence[Profile], shapes: Shapes) -> Split:
        """The best split by what the stages measured. Raises ValueError where that makes no sense."""
        costs = costs_of(profiles, shapes, self.partition.num_layers)
        return Split(Partition.balanced(costs, len(self.partition.stages)), costs, "measured")

    def describe(self) -> str:
        """For people, before the job runs."""
        if len(self.partition.stages) == 1:
            return f"one stage with all {self.partition.num_layers} layers"
        layers = " + ".join(map(str, self.partition.layers_per_stage))
        shares = ", ".join(f"{share:.0%}" for share in self.shares)
        costs = self.costs
        why = {
            "given": "as was asked for",
            "flops": "by counting FLOPs",
            "measured": f"as measured: a caption takes {costs.first * 1e3:.3g} ms for image and embedding, "
            f"{costs.layers[0] * 1e3:.3g} ms a layer, {costs.last * 1e3:.3g} ms for the output layer",
        }
        return f"layers of each stage: {layers}, {why[self.by]}; estimated shares of the work: {shares}"

    def outcome(self, stage_busy: Sequence[float]) -> list[str]:
        """For people, after it has run: of each stage what was estimated and what was. Nothing where there is one
        stage, or nothing was left to do."""
        whole = sum(stage_busy)
        if len(self.partition.stages) == 1 or not whole:
            return []
        each = zip(self.partition.layers_per_stage, self.shares, stage_busy, strict=True)
        return [
            f"stage {index}: {layers} {'layer' if layers == 1 else 'layers'}, estimated {share:.0%} of the work, had "
            f"{busy / whole:.0%} of it, was busy {busy:.2f}"
            for index, (layers, share, busy) in enumerate(each)
        ]
