"""`PartWriter`: whole shards on their way out: written by a task, then committed by the driver, beside its loop.

Where the output is slower than the stages, parts pile up here, and only here: a few are written at a time, and once
`PARTS_AHEAD` are under way no more rows are admitted.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError

from ray_ministral.captioning.request import RowResult
from ray_ministral.data.commits import LEAVE_S, Commits, Committed
from ray_ministral.data.parts import Attempt
from ray_ministral.driver import tasks
from ray_ministral.driver.job import CaptionJob
from ray_ministral.driver.pipeline import describe_error, raise_if_ours, root_cause
from ray_ministral.driver.trace import Trace
from ray_ministral.errors import ClusterError, LeaseLostError, OutputError, RayMinistralError

logger = logging.getLogger(__name__)

WRITES_AT_ONCE = 4
PARTS_AHEAD = 16


class PartWriter:
    """Of one job. A context manager: where the job ends early, what is whole is committed before it leaves."""

    def __init__(self, job: CaptionJob, trace: Trace, *, with_token_ids: bool) -> None:
        self._job, self._trace, self._with_token_ids = job, trace, with_token_ids
        self._commits = Commits(job.ledger)
        self._whole: deque[tuple[int, Sequence[RowResult]]] = deque()
        self._writes: dict[Any, tuple[int, float]] = {}
        self._generation = 0

    @property
    def waitables(self) -> Collection[Any]:
        """What `ray.wait` can wait on for a part that is written; `written` takes it then."""
        return self._writes.keys()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._writes and self._commits.is_idle

    @property
    def is_full(self) -> bool:
        """Whether so much is under way that no more rows should be begun."""
        return len(self._whole) + len(self._writes) + len(self._commits.under_way) >= PARTS_AHEAD

    @property
    def under_way(self) -> list[str]:
        """What is under way, for people."""
        return [f"the writing of {name}" for name in self._not_written()] + [
            f"the commit of {name}" for name in self._commits.under_way
        ]

    def write(self, shard_index: int, results: Sequence[RowResult], *, generation: int) -> None:
        """Have the part of a shard written; `results` of all its rows, or of those that were tried again."""
        self._generation = max(self._generation, generation)
        self._whole.append((shard_index, results))
        self._start_writes()

    def written(self, reference: Any) -> None:
        """Let a part that is written be committed. Raises `OutputError`, `ClusterError`."""
        shard_index, started = self._writes.pop(reference)
        self._start_writes()
        part_name = self._job.plan.shards[shard_index].part_name
        try:
            attempt: Attempt = ray.get(reference)
        except RayError as error:
            raise_if_ours(error)
            if isinstance(root_cause(error), OSError):
                raise OutputError(f"{part_name} cannot be written: {describe_error(error)}") from error
            raise ClusterError(f"{part_name} cannot be written: {describe_error(error)}") from error
        self._trace.beside("write", started, time.time() - started, part=part_name)
        self._commits.submit(shard_index, attempt, generation=self._generation)

    def committed(self) -> list[Committed]:
        """The parts that have come into the ledger since the last call. Raises as `Commits.done`."""
        done = self._commits.done()
        for commit in done:
            self._trace.beside("commit", commit.started, commit.seconds, part=commit.info.name)
        return done

    def wait_for_commit(self, timeout_s: float) -> bool:
        """Wait until `committed` has something to say; whether it has."""
        return self._commits.wait(timeout_s)

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, OutputError | LeaseLostError):
            self._commit_what_is_whole()
        self._commits.close()

    def _commit_what_is_whole(self) -> None:
        """The job ends early: shards that are whole are written already, or are being written."""
        deadline = time.monotonic() + LEAVE_S
        if under_way := self.under_way:
            logger.info("committing %d parts that are whole, in at most %.0f s", len(under_way), LEAVE_S)
        try:
            while self._writes and (left := deadline - time.monotonic()) > 0:
                ready, _ = ray.wait(list(self._writes), num_returns=1, timeout=left, fetch_local=False)
                for reference in ready:
                    self.written(reference)
        except (RayMinistralError, RayError) as later:  # what ended the job is what is told
            logger.warning("not everything that was whole could be committed: %s", later)
        if names := self._not_written():
            logger.warning("not written in time, and done again by the same command: %s", ", ".join(names))
        self._commits.close(max(0.0, deadline - time.monotonic()))

    def _start_writes(self) -> None:
        while self._whole and len(self._writes) < WRITES_AT_ONCE:
            shard_index, results = self._whole.popleft()
            shard = self._job.plan.shards[shard_index]
            with self._trace.driver("file", part=shard.part_name):
                reference = tasks.write.remote(
                    shard,
                    results,
                    self._job.ledger.output,
                    self._job.plan.carried_columns,
                    self._with_token_ids,
                    keep_others=shard_index in self._job.failed_rows,
                )
            self._writes[reference] = shard_index, time.time()

    def _not_written(self) -> list[str]:
        indices = [index for index, _ in (*self._writes.values(), *self._whole)]
        return [self._job.plan.shards[index].part_name for index in indices]
