"""`RowReader`: rows of parquet files in any order, in bounded memory.

Parquet can only be read from the start of a row group, so a row group that was read is kept, encoded as it was, until
the least recently used ones have to make room. One that is larger than the room is read anew each time, in small
batches, and only the rows asked for are kept.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import pyarrow as pa

from ray_ministral.data.columns import RowColumns
from ray_ministral.data.parquet import MAX_VALUE_BYTES, READ_ROWS, SourceRow, row_batches, source_row, too_few_rows
from ray_ministral.data.shards import Shard

CACHE_BYTES = 512 << 20

_GroupKey = tuple[str, int]


@dataclass(frozen=True)
class RowPlace:
    """Where a row is: a shard, and the row's number within the shard's row group."""

    shard: Shard
    row: int


class RowIndex:
    """All rows of some shards, numbered from 0 in input order."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = tuple(shards)
        self._ends = list(accumulate(shard.rows for shard in self._shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def group_rows(self) -> tuple[int, ...]:
        """Rows of each shard."""
        return tuple(shard.rows for shard in self._shards)

    def place(self, number: int) -> RowPlace:
        """Where row `number` is."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        index = bisect_right(self._ends, number)
        shard = self._shards[index]
        return RowPlace(shard=shard, row=shard.stop - (self._ends[index] - number))


@dataclass(eq=False)
class _Group:
    """The batches of a row group that have been read, with the row at which each begins."""

    batches: list[pa.RecordBatch] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0

    def append(self, batch: pa.RecordBatch) -> None:
        self.batches.append(batch)
        self.starts.append(self.rows)
        self.rows += batch.num_rows
        self.bytes += batch.get_total_buffer_size()

    def find(self, row: int) -> tuple[pa.RecordBatch, int]:
        index = bisect_right(self.starts, row) - 1
        return self.batches[index], row - self.starts[index]


class RowReader:
    """Reads rows by their places; keeps at most `cache_bytes` of row groups, plus a batch of `batch_rows` rows."""

    def __init__(
        self,
        columns: RowColumns,
        *,
        cache_bytes: int = CACHE_BYTES,
        batch_rows: int = READ_ROWS,
        max_value_bytes: int = MAX_VALUE_BYTES,
    ) -> None:
        self._columns = columns
        self._cache_bytes = cache_bytes
        self._batch_rows = batch_rows
        self._max_value_bytes = max_value_bytes
        self._groups: OrderedDict[_GroupKey, _Group] = OrderedDict()
        self._too_large: set[_GroupKey] = set()
        self.cached_bytes = 0
        self.groups_read = 0

    def read(self, places: Sequence[RowPlace]) -> list[SourceRow]:
        """The rows at `places`, in this order; each row group is gone through once at most.

        What is wrong with a row is its `error`. Raises InputError where a file cannot be read or lacks rows.
        """
        by_group: defaultdict[_GroupKey, list[RowPlace]] = defaultdict(list)
        for place in places:
            by_group[place.shard.location, place.shard.row_group].append(place)
        found: dict[tuple[_GroupKey, int], SourceRow] = {}
        for key, wanted in by_group.items():
            for row in self._rows_of_group(key, wanted):
                found[key, row.row] = row
        return [found[(place.shard.location, place.shard.row_group), place.row] for place in places]

    def _rows_of_group(self, key: _GroupKey, places: Sequence[RowPlace]) -> Iterator[SourceRow]:
        group = self._groups.get(key)
        if group is not None:
            self._groups.move_to_end(key)
            _require_rows(places, group.rows)
            for place in places:
                yield self._source_row(place, *group.find(place.row))
            return
        yield from self._read_group(key, places)

    def _read_group(self, key: _GroupKey, places: Sequence[RowPlace]) -> Iterator[SourceRow]:
        """Rows of a row group that is not kept yet; keeps it if there is room."""
        self.groups_read += 1
        pending = sorted({place.row: place for place in places}.values(), key=lambda place: place.row, reverse=True)
        kept: _Group | None = None if key in self._too_large else _Group()
        position = 0
        # what is kept is the whole row group, whatever shards were cut out of it
        for batch in row_batches(pending[0].shard, self._columns.names, self._batch_rows, stop=sys.maxsize):
            while pending and pending[-1].row < position + batch.num_rows:
                place = pending.pop()
                yield self._source_row(place, batch, place.row - position)
            position += batch.num_rows
            if kept is not None:
                kept.append(batch)
                if not self._make_room(kept.bytes):
                    self._too_large.add(key)
                    kept = None
            if kept is None and not pending:
                return
        _require_rows(places, position)
        if kept is not None:
            self._groups[key] = kept
            self.cached_bytes += kept.bytes

    def _make_room(self, size: int) -> bool:
        """Drop the least recently used groups until `size` bytes fit; False where they never will."""
        if size > self._cache_bytes:
            return False
        while self._groups and self.cached_bytes + size > self._cache_bytes:
            _, group = self._groups.popitem(last=False)
            self.cached_bytes -= group.bytes
        return True

    def _source_row(self, place: RowPlace, batch: pa.RecordBatch, offset: int) -> SourceRow:
        return source_row(place.shard, place.row, batch, offset, self._columns, self._max_value_bytes)


def _require_rows(places: Sequence[RowPlace], rows: int) -> None:
    for place in places:
        if place.row >= rows:
            raise too_few_rows(place.shard, rows, place.shard.stop)
