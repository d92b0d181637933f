"""`LostRows`: what becomes of rows that have lost their step, their replica or their pixels.

They keep what they have generated. Rows of a step that failed go back to their replica, in the company that
`Suspects` says; those of a replica that recovers are homeless, and go to whichever replica has room first; those whose
pixels were lost with a node come back when they are prepared again. One that was at fault is given up.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError

from ray_ministral.captioning.batching import Request
from ray_ministral.captioning.plan import StepPlan
from ray_ministral.captioning.request import RowFailure
from ray_ministral.captioning.suspects import Suspects, Verdict
from ray_ministral.data.shards import Shard
from ray_ministral.driver.feeder import Feeder
from ray_ministral.driver.pipeline import describe_error, lost_objects, root_cause
from ray_ministral.driver.replica import Replica
from ray_ministral.errors import StageDiedError

logger = logging.getLogger(__name__)

GiveUp = Callable[[Request, RowFailure], None]
"""Takes a row that is given up, and why."""


class LostRows:
    """Of a whole job."""

    def __init__(self, shards: Sequence[Shard], feeder: Feeder, give_up: GiveUp) -> None:
        self.suspects = Suspects()
        self._shards, self._feeder, self._give_up = shards, feeder, give_up
        self._homeless: deque[Request] = deque()
        self._without_pixels: dict[tuple[int, int], Request] = {}

    @property
    def are_homeless(self) -> bool:
        """Whether rows wait for a replica."""
        return bool(self._homeless)

    def house(self, replica: Replica) -> bool:
        """Give as many homeless rows to a replica as it has room for; whether it was any."""
        rows = [self._homeless.popleft() for _ in range(min(replica.room, len(self._homeless)))]
        replica.scheduler.add_first(rows)
        return bool(rows)

    def prepared_again(self, shard_index: int, row: int, pixels: Any) -> Request | None:
        """The request that waits for the pixels of a row; None for a row that has not been here before."""
        request = self._without_pixels.pop((shard_index, row), None)
        if request is not None:
            request.pixels = pixels
        return request

    def stage_died(self, verdict: Verdict, error: StageDiedError) -> None:
        """A replica gives its rows back."""
        self._homeless.extendleft(reversed(verdict.again))
        self._give_up_all(verdict, f"a stage died each time that this row was on it: {error}", "prefill")

    def step_failed(self, replica: Replica, replicas: Sequence[Replica], plan: StepPlan, error: RayError) -> None:
        """A step came back with an error, though all stages live; `replicas` are all of the job."""
        rows = replica.scheduler.fail(plan)
        logger.warning("%s: step %d failed: %s", replica.pipeline.name, plan.step, describe_error(error))
        if isinstance(root_cause(error), RayError):
            # No fault of the rows: their pixels, or a stage's result, were lost with a node.
            replica.scheduler.add_first(rows)
            self._prepare_lost(replicas, rows[plan.num_decode :])
            return
        verdict = self.suspects.after_error(rows)
        replica.scheduler.add_first(verdict.again)
        self._give_up_all(verdict, describe_error(error), "prefill" if plan.prefills else "decode_token")

    def _prepare_lost(self, replicas: Sequence[Replica], entering: Sequence[Request]) -> None:
        """Read rows once more whose pixels are gone: of a step that missed some, and of all that wait for theirs."""
        queues = [self._homeless, *(replica.scheduler.waiting for replica in replicas)]
        waiting = [request for queue in queues for request in queue]
        gone = lost_objects({request.block for request in waiting} - {None})
        gone |= {request.block for request in entering} - {None}
        lost = [request for request in waiting if request.block in gone]
        for queue in queues:
            kept = [request for request in queue if request.block not in gone]
            queue.clear()
            queue.extend(kept)
        for request in lost:
            request.pixels = None
            self._without_pixels[request.key.shard_index, request.key.row] = request
        rows = [(self._shards[request.key.shard_index], request.key.row) for request in lost]
        self._feeder.again([replace(shard, start=row, stop=row + 1) for shard, row in rows])

    def _give_up_all(self, verdict: Verdict, error: str, stage: str) -> None:
        for request in verdict.given_up:
            self._give_up(request, RowFailure("engine_error", error, stage))
