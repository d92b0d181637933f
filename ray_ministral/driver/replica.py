"""`Replica`: a pipeline, its scheduler and the steps in flight on it; and the keys of the rows that it captions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from ray_ministral.captioning.batching import BatchScheduler
from ray_ministral.captioning.plan import StepPlan
from ray_ministral.captioning.step_times import StageTotals
from ray_ministral.data.shards import Shard
from ray_ministral.driver.pipeline import Pipeline
from ray_ministral.driver.policies import Death
from ray_ministral.driver.recovery import Recovery

TOTALS_TIMEOUT_S = 5.0


@dataclass(eq=False)
class Replica:
    """A pipeline, what is scheduled on it, and the steps in flight by the reference to their tokens.

    recovery: while it is on its way to work. deaths: of its stages so far; rows: that it has finished since the last.
    before: what actors that are gone have done, for each stage.
    """

    pipeline: Pipeline
    scheduler: BatchScheduler
    in_flight: dict[Any, StepPlan] = field(default_factory=dict)
    recovery: Recovery | None = None
    deaths: list[Death] = field(default_factory=list)
    rows: int = 0
    before: dict[int, StageTotals] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """How many rows it may be given; none while it recovers."""
        return self.scheduler.room if self.recovery is None else 0

    def launch(self) -> None:
        """Send a step of every microbatch that is not in flight through all stages."""
        if self.recovery is not None:
            return
        first, *others = self.pipeline.actors
        for launch in self.scheduler.launches():
            result = first.step.remote(launch.plan, None, *launch.blocks)
            if others:
                plan = launch.plan.without_token_ids()
                for actor in others:
                    result = actor.step.remote(plan, result)
            self.in_flight[result] = launch.plan

    def totals(self) -> list[StageTotals]:
        """What the steps of each stage took so far; nothing for a stage that does not answer."""
        now = self.pipeline.ask("totals", TOTALS_TIMEOUT_S)
        return [
            self.before.get(stage, StageTotals()).and_also(totals or StageTotals()) for stage, totals in enumerate(now)
        ]


@dataclass(frozen=True)
class RowKey:
    """What a request's result is filed under, and what the driver keeps about its prompt."""

    shard_index: int
    row: int
    images: int
    image_tokens: int


def sample_key(shard: Shard, row: int) -> int:
    """uint64 that keys a row's random numbers: a hash of its place, whatever the job reads besides."""
    place = f"{shard.file}\0{shard.row_group}\0{row}".encode()
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little")
