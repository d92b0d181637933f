"""How many stages a training run has after a loss, and when there is room again: pure functions, no Ray, no clock."""

from __future__ import annotations

from dataclasses import dataclass

from ray_ministral.config import TrainConfig
from ray_ministral.errors import ConfigError
from ray_ministral.pipeline.generators import make_schedule
from ray_ministral.training.packing import num_microbatches


@dataclass(frozen=True)
class ScalingPolicy:
    """`possible`: the numbers of stages that the run may have, ascending."""

    possible: tuple[int, ...]

    @classmethod
    def of(cls, config: TrainConfig, num_layers: int) -> ScalingPolicy:
        """Between `--min-stages` and `--max-stages` those for which there are a schedule and a layer for each chunk.

        Several replicas keep their number of stages.
        """
        pipeline, chunks = config.pipeline, config.chunks_per_stage
        most = pipeline.stages if config.max_stages is None else config.max_stages
        if pipeline.replicas > 1:
            return cls((pipeline.stages,))
        microbatches = num_microbatches(config.global_batch_size, config.microbatch_size)
        possible = []
        for stages in range(config.fewest_stages, most + 1):
            try:
                make_schedule(config.schedule, stages, microbatches, chunks)
            except ConfigError:
                continue
            if stages * chunks <= num_layers:
                possible.append(stages)
        return cls(tuple(possible))

    def after_loss(self, before: int, survivors: int, room: int) -> int | None:
        """What to go on with, of `before` stages, where `room` others can start now. None: wait until there is more."""
        return max((stages for stages in self.possible if stages <= min(before, survivors + room)), default=None)

    def waits_for(self, survivors: int) -> int:
        """Actors that have to be found where `after_loss` is None."""
        return min((stages for stages in self.possible if stages > survivors), default=survivors) - survivors

    def next_above(self, stages: int) -> int | None:
        """The number to grow to from `stages`; None: there is no larger one."""
        return min((number for number in self.possible if number > stages), default=None)
