"""`Feeder`: rows prepared ahead of need, in input order, in bounded memory.

A unit is a run of shards of one row group: it is read once, by one task. A few units are under way at a time, each
stopped by Ray when what it has made is not taken. If a preparing worker dies (a decoder that crashes, memory, a row's
deadline) or is given up by `restart_stuck`, the rows that it was at are prepared again one by one, so that the row at
fault stands alone and becomes an error of its own. What dies before it has begun with its rows is no row's fault.
`take` waits for no worker: one that was stopped between a chunk and its pixels must not stop the driver.
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
from ray.exceptions import NodeDiedError, ObjectLostError, RayError, RayTaskError

from ray_ministral.captioning.prepare import CHUNK_ROWS
from ray_ministral.captioning.request import Began, PreparedChunk, PreparedRow, RowFailure
from ray_ministral.config import ImageLimits
from ray_ministral.data.shards import Shard
from ray_ministral.driver.pipeline import describe_error, raise_if_ours
from ray_ministral.errors import ClusterError

logger = logging.getLogger(__name__)

UNITS_AHEAD = 2
TAKE_TIMEOUT_S = 600.0

DEATHS_BY_ITSELF = 2
"""A row becomes an error when so many workers have died of it alone: one may have died for another reason."""

MAX_STILLBORN = 10
"""So many workers in a row may die before they begin; then something is wrong with all of them."""

StartPrepare = Callable[[Sequence[Shard]], Any]
"""Starts a `tasks.prepare`; gives its generator of references."""


@dataclass(frozen=True)
class Prepared:
    """A chunk, and the reference to its pixels (None where it has none)."""

    chunk: PreparedChunk
    pixels: Any


@dataclass(eq=False)
class _Unit:
    """Shards under way; `row` is the next row that is wanted from `shards[0]`.

    `suspect`: how many workers that may have been at it have died; where any has, it is one row. `chunk` is one that is
    there already while its pixels are not.
    """

    shards: list[Shard]
    generator: Any
    row: int
    suspect: int
    life: _Life
    chunk: PreparedChunk | None = None


class _Life:
    """How long a worker was at its rows until it ended or died, however late somebody asks.

    By the clocks of its machine and of this one: good enough to say which of two things has happened.
    """

    def __init__(self, generator: Any) -> None:
        self.began: float | None = None
        self._ended: float | None = None
        self._end = generator.completed().future()  # kept, so that it is called
        self._end.add_done_callback(self._note_end)

    def _note_end(self, _: Any) -> None:
        self._ended = time.time()

    @property
    def seconds(self) -> float:
        if self.began is None:
            return 0.0
        return (time.time() if self._ended is None else self._ended) - self.began


class Feeder:
    """Takes shards, gives `Prepared` chunks in the same order. A row that takes `deadline_s` ends its worker."""

    def __init__(
        self,
        shards: Iterable[Shard],
        start: StartPrepare,
        deadline_s: float = ImageLimits.deadline_s,
        units_ahead: int = UNITS_AHEAD,
    ) -> None:
        self._todo = deque((list(unit), 0) for _, unit in groupby(shards, key=_row_group))
        self._start = start
        self._units: deque[_Unit] = deque()
        self._deadline_s, self._ahead = deadline_s, units_ahead
        self._stillborn = 0
        self._ready: deque[Prepared] = deque()  # what was looked at, or became an error, and was not taken yet
        self.fill()

    @property
    def exhausted(self) -> bool:
        """Whether every row has been taken."""
        return not self._units and not self._todo and not self._ready

    def again(self, shards: Sequence[Shard]) -> None:
        """Prepare these once more, before what has not been begun: those of a row group in one pass."""
        ordered = sorted(shards, key=lambda shard: (*_row_group(shard), shard.start))
        self._todo.extendleft(reversed([(list(unit), 0) for _, unit in groupby(ordered, key=_row_group)]))
        self.fill()

    def fill(self) -> None:
        """Start units until enough are under way."""
        while self._todo and len(self._units) < self._ahead:
            shards, suspect = self._todo.popleft()
            generator = self._start(shards)
            self._units.append(_Unit(shards, generator, shards[0].start, suspect, _Life(generator)))

    def begin_again(self) -> None:
        """A node is gone. Start all units under way once more, each where it is.

        Ray does not always say so of a stream whose task was there (2.60): it would be waited for in vain.
        """
        self._before_those_under_way([])

    def close(self) -> None:
        """Stop what is under way, also workers that do not answer. Never raises."""
        self._cancel()

    def _cancel(self) -> None:
        """End the workers of all units, not only their tasks: one that was stopped in an import is of no more use."""
        for unit in self._units:
            with suppress(RayError):
                ray.cancel(unit.generator, force=True)
        self._units.clear()

    def under_way(self) -> list[str]:
        """What is being prepared, for people."""
        rest = [(unit.row, unit.shards[0]) for unit in self._units if unit.shards]  # else all of its rows are here
        return [f"row {row} of row group {shard.row_group} of {shard.file}" for row, shard in rest]

    def waitable(self) -> Any:
        """What `ray.wait` can wait on for the next chunk; None when there is none to come."""
        return self._units[0].generator if self._units else None

    def peek(self, timeout_s: float) -> Prepared | None:
        """The next chunk, which `take` gives once more; None where none comes within the time. Raises as `take`."""
        deadline = time.monotonic() + timeout_s
        while not self._ready and not self.exhausted:
            prepared = self.take()
            if prepared is not None:
                self._ready.append(prepared)
                break
            left = deadline - time.monotonic()
            if left <= 0:
                break
            if self._units:
                ray.wait([self._units[0].generator], timeout=left, fetch_local=False)
        return self._ready[0] if self._ready else None

    def take(self) -> Prepared | None:
        """The next chunk if one is ready, else None. Raises what is wrong with a file, a model or the cluster."""
        if self._ready:
            return self._ready.popleft()
        while self._units:
            unit = self._units[0]
            if not _has_more(unit):
                return None
            try:
                if unit.chunk is None:
                    item = ray.get(next(unit.generator), timeout=TAKE_TIMEOUT_S)
                    if isinstance(item, Began):
                        unit.life.began = item.at
                        self._stillborn = 0
                    else:
                        unit.chunk = item
                    continue
                chunk, pixels = unit.chunk, next(unit.generator)
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
            except (NodeDiedError, ObjectLostError) as error:
                self._begin_again(unit, error)
                continue
            except RayError as error:
                self._retry(unit, self._death(unit, error))
                if self._ready:
                    return self._ready.popleft()
                continue
            self._advance(unit, chunk)
            return Prepared(chunk, pixels if chunk.pixel_bytes else None)
        return None

    def restart_stuck(self, silent_s: float) -> bool:
        """Give up the worker that the next chunk should come from, and prepare its rows again as if it had died.

        For a driver that has waited `silent_s` seconds for `waitable`. Returns whether there was such a worker: False
        where nothing is under way or the next chunk is there, so that the silence has another cause. A row that was
        alone in its unit already becomes an error. So a worker that was stopped, or waits for storage that does not
        answer, costs nothing but the time, and one row that stops every worker costs that row.

        Ray 2.60, tried with a worker under SIGSTOP: `ray.cancel` does nothing to it, and to ask its generator for the
        next reference after that never returns; `ray.cancel(force=True)` returns at once and the worker is gone within
        ten seconds, killed by the raylet of its node, so that no pid is needed. Its generator is not touched again.
        The rows do not wait for its end.
        """
        if self._ready or not self._units or _has_more(self._units[0]):
            return False
        unit = self._units[0]
        logger.warning("the worker at %s has said nothing for %.0f s: giving it up", self.under_way()[0], silent_s)
        with suppress(RayError):
            ray.cancel(unit.generator, force=True)
        reason = f"the worker that prepared this row said nothing for {silent_s:.0f} s and was given up"
        self._retry(unit, reason)
        return True

    def _advance(self, unit: _Unit, chunk: PreparedChunk) -> None:
        """Note that a chunk was taken. It can span several shards, where they are single rows to be tried again."""
        unit.chunk = None
        unit.row = chunk.rows[-1].row + 1
        while unit.shards and unit.row >= unit.shards[0].stop:
            unit.shards.pop(0)
        if unit.shards:
            unit.row = max(unit.row, unit.shards[0].start)

    def _retry(self, unit: _Unit, reason: str) -> None:
        """The unit's worker died, or was given up. A row that has had its chances becomes an error, `_ready` then.

        One that had not begun with its rows says nothing of them: another one begins. Raises `ClusterError` where none
        ever begins. Else each of the rows that can have been in the chunk under way is tried alone; those after them
        stay together, since a unit of one row reads the row group from its start.
        """
        self._units.popleft()
        if not unit.shards:  # it died after its last row
            self.fill()
            return
        if unit.life.began is None:
            self._stillborn += 1
            if self._stillborn > MAX_STILLBORN:
                raise ClusterError(
                    f"{self._stillborn} workers that were to prepare rows died one after the other before they began; "
                    f"the last one: {reason}; see Ray's logs of its node for what it died of"
                )
            logger.warning("preparing again: the worker for row %d had not begun: %s", unit.row, reason)
            self._before_those_under_way([(_rest(unit), unit.suspect)])
            return
        shard = replace(unit.shards[0], start=unit.row)
        if unit.suspect >= DEATHS_BY_ITSELF:
            row = PreparedRow(unit.row, None, (), RowFailure("engine_error", reason, "decode"))
            self._ready.append(Prepared(PreparedChunk(shard.index, (row,), 0), None))
            self.fill()
            return
        logger.warning(
            "trying rows of row group %d of %s from row %d on one by one: %s",
            shard.row_group,
            shard.file,
            shard.start,
            reason,
        )
        suspects, rest = _singled_out([shard, *unit.shards[1:]], CHUNK_ROWS)
        again = [*(([one], unit.suspect + 1) for one in suspects), *([(rest, 0)] if rest else [])]
        self._before_those_under_way(again)

    def _begin_again(self, unit: _Unit, error: RayError) -> None:
        """A node died with the unit's worker, or with what it had made: no row is to blame."""
        logger.warning("preparing again: %s: %s", ", ".join(self.under_way()), describe_error(error))
        self._units.popleft()
        self._before_those_under_way([(_rest(unit), unit.suspect)] if unit.shards else [])

    def _before_those_under_way(self, first: list[tuple[list[Shard], int]]) -> None:
        """Units under way come after these `first`; they are started again then, in order, each where it is."""
        later = [(_rest(unit), unit.suspect) for unit in self._units if unit.shards]
        self._cancel()
        self._todo.extendleft(reversed([*first, *later]))
        self.fill()

    def _death(self, unit: _Unit, error: RayError) -> str:
        """Why the worker of a unit died. Of a row alone it is known whether it had the time that a row may take."""
        if unit.suspect and unit.life.seconds >= self._deadline_s:
            return (
                f"preparing this row took longer than its deadline of {self._deadline_s:g} s (ImageLimits.deadline_s), "
                f"and the worker was ended ({describe_error(error)}); raise the deadline if it is a good one"
            )
        return f"the worker that prepared this row died: {describe_error(error)}"


def _rest(unit: _Unit) -> list[Shard]:
    """What has not been taken of a unit."""
    return [replace(unit.shards[0], start=unit.row), *unit.shards[1:]]


def _row_group(shard: Shard) -> tuple[int, int]:
    return shard.file_index, shard.row_group


def _has_more(unit: _Unit) -> bool:
    """Whether the unit's next reference, or its end, is there."""
    ready, _ = ray.wait([unit.generator], timeout=0, fetch_local=False)
    return bool(ready)


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
