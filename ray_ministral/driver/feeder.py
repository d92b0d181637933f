"""`Feeder`: rows prepared ahead of need, in input order, in bounded memory.

A unit is a run of shards of one row group: it is read once, by one task. A few units are under way at a time, each
stopped by Ray when what it has made is not taken. If a preparing worker dies (a decoder that crashes, memory), its
remaining rows are prepared again one by one, so that the row at fault stands alone and becomes an error of its own.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ray_ministral.captioning.request import PreparedChunk, PreparedRow, RowFailure
from ray_ministral.data.shards import Shard
from ray_ministral.driver.pipeline import describe_error, root_cause
from ray_ministral.errors import ClusterError, RayMinistralError

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
    """Shards under way; `generator` yields references; `row` is the next row that is wanted from `shards[0]`."""

    shards: list[Shard]
    generator: Any
    row: int


class Feeder:
    """Takes shards, gives `Prepared` chunks in the same order."""

    def __init__(self, shards: Iterable[Shard], start: StartPrepare, units_ahead: int = UNITS_AHEAD) -> None:
        self._todo = deque(
            list(unit) for _, unit in groupby(shards, key=lambda shard: (shard.file_index, shard.row_group))
        )
        self._start = start
        self._units: deque[_Unit] = deque()
        self._ahead = units_ahead
        self.fill()

    @property
    def exhausted(self) -> bool:
        """Whether every row has been taken."""
        return not self._units and not self._todo

    def fill(self) -> None:
        """Start units until enough are under way."""
        while self._todo and len(self._units) < self._ahead:
            shards = self._todo.popleft()
            self._units.append(_Unit(shards, self._start(shards), shards[0].start))

    def close(self) -> None:
        """Stop what is under way. Never raises."""
        for unit in self._units:
            with suppress(RayError):
                ray.cancel(unit.generator)
        self._units.clear()

    def waitable(self) -> Any:
        """What `ray.wait` can wait on for the next chunk; None when there is none to come."""
        return self._units[0].generator if self._units else None

    def take(self) -> Prepared | None:
        """The next chunk if one is ready, else None. Raises what is wrong with a file, a model or the cluster."""
        while self._units:
            unit = self._units[0]
            ready, _ = ray.wait([unit.generator], timeout=0, fetch_local=False)
            if not ready:
                return None
            try:
                chunk: PreparedChunk = ray.get(next(unit.generator), timeout=TAKE_TIMEOUT_S)
                pixels = next(unit.generator)
            except StopIteration:
                self._units.popleft()
                self.fill()
                continue
            except RayTaskError as error:
                cause = root_cause(error)
                if isinstance(cause, RayMinistralError):
                    raise cause from None
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
        unit.row = chunk.rows[-1].row + 1
        while unit.shards and unit.row >= unit.shards[0].stop:
            unit.shards.pop(0)
            if unit.shards:
                unit.row = unit.shards[0].start

    def _retry(self, unit: _Unit, error: RayError) -> Prepared | None:
        """The unit's worker died. A unit of one row is given up as that row's error; else each row gets a unit."""
        self._units.popleft()
        shard = replace(unit.shards[0], start=unit.row)
        if shard.rows == 1 and len(unit.shards) == 1:
            failure = RowFailure(
                "engine_error", f"the worker that prepared this row died: {describe_error(error)}", "decode"
            )
            self.fill()
            return Prepared(PreparedChunk(shard.index, (PreparedRow(unit.row, None, (), failure),), 0), None)
        logger.warning("a worker that prepared rows of %s died (%s); trying them one by one", shard.file, error)
        rest = [shard, *unit.shards[1:]]
        singles = [replace(piece, start=row, stop=row + 1) for piece in rest for row in range(piece.start, piece.stop)]
        self._todo.extendleft([single] for single in reversed(singles))
        # Units already under way come after these rows; they are started again later, in order.
        later = [waiting.shards for waiting in self._units]
        self.close()
        for position, shards in enumerate(later):
            self._todo.insert(len(singles) + position, shards)
        self.fill()
        return None
