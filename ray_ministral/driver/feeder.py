"""`Feeder`: rows prepared ahead of need, in input order, in bounded memory.

A unit is a run of shards of one row group: it is read once, by one task. A few units are under way at a time, each
stopped by Ray when what it has made is not taken. If a preparing worker dies (a decoder that crashes, memory), the rows
that it was at are prepared again one by one, so that the row at fault stands alone and becomes an error of its own.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ray_ministral.captioning.prepare import CHUNK_ROWS
from ray_ministral.captioning.request import PreparedChunk, PreparedRow, RowFailure
from ray_ministral.data.shards import Shard
from ray_ministral.driver.pipeline import describe_error, raise_if_ours
from ray_ministral.errors import ClusterError

logger = logging.getLogger(__name__)

UNITS_AHEAD = 2
TAKE_TIMEOUT_S = 600.0

StartPrepare = Callable[[Sequence[Shard]], Any]


@dataclass(frozen=True)
class Prepared:
    """A chunk, and the reference to its pixels (None where it has none)."""

    chunk: PreparedChunk
    pixels: Any


@dataclass(eq=False)
class _Unit:
    """Shards under way; `generator` yields references; `row` is the next row that is wanted from `shards[0]`.

    `suspect`: it is one row, and a worker that may have been at it has died.
    """

    shards: list[Shard]
    generator: Any
    row: int
    suspect: bool


class Feeder:
    """Takes shards, gives `Prepared` chunks in the same order."""

    def __init__(self, shards: Iterable[Shard], start: StartPrepare, units_ahead: int = UNITS_AHEAD) -> None:
        self._todo = deque(
            (list(unit), False) for _, unit in groupby(shards, key=lambda shard: (shard.file_index, shard.row_group))
        )
        self._start = start
        self._units: deque[_Unit] = deque()
        self._ahead = units_ahead
        self._peeked: Prepared | None = None
        self.fill()

    @property
    def exhausted(self) -> bool:
        """Whether every row has been taken."""
        return not self._units and not self._todo and self._peeked is None

    def again(self, shards: Sequence[Shard]) -> None:
        """Prepare these once more, before what has not been begun."""
        self._todo.extendleft(([shard], False) for shard in reversed(shards))
        self.fill()

    def fill(self) -> None:
        """Start units until enough are under way."""
        while self._todo and len(self._units) < self._ahead:
            shards, suspect = self._todo.popleft()
            self._units.append(_Unit(shards, self._start(shards), shards[0].start, suspect))

    def close(self) -> None:
        """Stop what is under way. Never raises."""
        for unit in self._units:
            with suppress(RayError):
                ray.cancel(unit.generator)
        self._units.clear()

    def under_way(self) -> list[str]:
        """What is being prepared, for people."""
        return [f"row {u.row} of row group {u.shards[0].row_group} of {u.shards[0].file}" for u in self._units]

    def waitable(self) -> Any:
        """What `ray.wait` can wait on for the next chunk; None when there is none to come."""
        return self._units[0].generator if self._units else None

    def peek(self, timeout_s: float) -> Prepared | None:
        """The next chunk, which `take` gives once more; None where none comes within the time. Raises as `take`."""
        deadline = time.monotonic() + timeout_s
        while self._peeked is None and not self.exhausted:
            self._peeked = self.take()
            left = deadline - time.monotonic()
            if self._peeked is not None or left <= 0:
                break
            if self._units:
                ray.wait([self._units[0].generator], timeout=left, fetch_local=False)
        return self._peeked

    def take(self) -> Prepared | None:
        """The next chunk if one is ready, else None. Raises what is wrong with a file, a model or the cluster."""
        if self._peeked is not None:
            prepared, self._peeked = self._peeked, None
            return prepared
        while self._units:
            unit = self._units[0]
            ready, _ = ray.wait([unit.generator], timeout=0, fetch_local=False)
            if not ready:
                return None
            try:
                chunk: PreparedChunk = ray.get(next(unit.generator), timeout=TAKE_TIMEOUT_S)
                pixels = next(unit.generator)
                if pixels == unit.generator.completed():
                    # Not pixels: the worker died after the chunk, and this reference holds the error.
                    ray.get(pixels, timeout=TAKE_TIMEOUT_S)
            except StopIteration:
                self._units.popleft()
                self.fill()
                continue
            except RayTaskError as error:
                raise_if_ours(error)
                raise ClusterError(
                    f"rows of {unit.shards[0].file} cannot be prepared: {describe_error(error)}"
                ) from error
            except RayError as error:
                failed = self._retry(unit, error)
                if failed is not None:
                    return failed
                continue
            self._advance(unit, chunk)
            return Prepared(chunk, pixels if chunk.pixel_bytes else None)
        return None

    def _advance(self, unit: _Unit, chunk: PreparedChunk) -> None:
        """Note that a chunk was taken. It can span several shards, where they are single rows to be tried again."""
        unit.row = chunk.rows[-1].row + 1
        while unit.shards and unit.row >= unit.shards[0].stop:
            unit.shards.pop(0)
        if unit.shards:
            unit.row = max(unit.row, unit.shards[0].start)

    def _retry(self, unit: _Unit, error: RayError) -> Prepared | None:
        """The unit's worker died. A suspect row is given up, as that row's error.

        Else each of the rows that can have been in the chunk under way is tried alone; those after them stay together,
        since a unit of one row reads the row group from its start.
        """
        self._units.popleft()
        if not unit.shards:  # it died after its last row
            self.fill()
            return None
        shard = replace(unit.shards[0], start=unit.row)
        if unit.suspect:
            failure = RowFailure(
                "engine_error", f"the worker that prepared this row died: {describe_error(error)}", "decode"
            )
            self.fill()
            return Prepared(PreparedChunk(shard.index, (PreparedRow(unit.row, None, (), failure),), 0), None)
        logger.warning(
            "a worker that prepared rows of %s died (%s); trying them one by one", shard.file, describe_error(error)
        )
        # Units already under way come after these rows; they are started again later, in order.
        later = [(waiting.shards, waiting.suspect) for waiting in self._units]
        self.close()
        suspects, rest = _singled_out([shard, *unit.shards[1:]], CHUNK_ROWS)
        again = [*(([suspect], True) for suspect in suspects), *([(rest, False)] if rest else []), *later]
        self._todo.extendleft(reversed(again))
        self.fill()
        return None


def _singled_out(shards: Sequence[Shard], rows: int) -> tuple[list[Shard], list[Shard]]:
    """The first `rows` rows of a row group's shards as a shard each, and the others."""
    singles: list[Shard] = []
    rest: list[Shard] = []
    for shard in shards:
        middle = min(shard.start + rows - len(singles), shard.stop)
        singles += [replace(shard, start=row, stop=row + 1) for row in range(shard.start, middle)]
        if middle < shard.stop:
            rest.append(replace(shard, start=middle))
    return singles, rest
