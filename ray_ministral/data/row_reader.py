"""`RowReader`: rows of parquet files in any order, in bounded memory.

Parquet can only be read from the start of a row group on. So what was read is kept, encoded as it was, in pieces (a
small row group is one piece, a large one many), until the least recently used pieces have to make room; and a row group
that was not read to its end stays open where the reading stopped. Rows that come about in the order of the file (see
`training.order` for data that is larger than the room) are read once, however large the row groups are.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import pyarrow as pa

from ray_ministral.data.columns import RowColumns
from ray_ministral.data.parquet import MAX_VALUE_BYTES, READ_ROWS, SourceRow, row_batches, source_row, too_few_rows
from ray_ministral.data.shards import Shard
from ray_ministral.errors import InputError

CACHE_BYTES = 1 << 30
PIECES_IN_CACHE = 16
"""A piece has about this part of the room: so much of it may lie unused beside what is used."""
OPEN_GROUPS = 4
"""Row groups that stay open: each holds a file and a decoder's buffers."""

_GroupKey = tuple[str, int]


@dataclass(frozen=True)
class RowPlace:
    """Where a row is: a shard, and the row's number within the shard's row group."""

    shard: Shard
    row: int


class RowIndex:
    """All rows of some shards, numbered from 0 in input order.

    `shard_bytes` is what the shards' rows take, about: for deciding in which order to read them, not to be relied on.
    """

    def __init__(self, shards: Sequence[Shard], shard_bytes: Sequence[int] = ()) -> None:
        self._shards = tuple(shards)
        self.shard_bytes = tuple(shard_bytes)
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
class _Piece:
    """Batches of a row group that follow each other, with the row at which each begins; rows `start` up to `stop`."""

    start: int
    stop: int
    batches: list[pa.RecordBatch] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    bytes: int = 0

    def append(self, batch: pa.RecordBatch) -> None:
        self.batches.append(batch)
        self.starts.append(self.stop)
        self.stop += batch.num_rows
        self.bytes += batch.get_total_buffer_size()

    def find(self, row: int) -> tuple[pa.RecordBatch, int]:
        index = bisect_right(self.starts, row) - 1
        return self.batches[index], row - self.starts[index]


@dataclass(eq=False)
class _Group:
    """How far a row group has been read: where its pieces begin, and the batches to come, None where it is closed."""

    starts: list[int] = field(default_factory=list)
    position: int = 0
    ended: bool = False
    batches: Generator[pa.RecordBatch] | None = None

    def close(self) -> None:
        if self.batches is not None:
            self.batches.close()
            self.batches = None


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
        self._groups: dict[_GroupKey, _Group] = {}
        self._open: OrderedDict[_GroupKey, _Group] = OrderedDict()
        self._pieces: OrderedDict[tuple[_GroupKey, int], _Piece] = OrderedDict()
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
        piece: _Piece | None = None
        for place in sorted({place.row: place for place in places}.values(), key=lambda place: place.row):
            if piece is None or place.row >= piece.stop:
                piece = self._kept(key, place.row) or self._read_to(key, place)
            batch, offset = piece.find(place.row)
            yield source_row(place.shard, place.row, batch, offset, self._columns, self._max_value_bytes)

    def _kept(self, key: _GroupKey, row: int) -> _Piece | None:
        group = self._groups.get(key)
        number = -1 if group is None else bisect_right(group.starts, row) - 1
        piece = self._pieces.get((key, number))
        if piece is None or row >= piece.stop:
            return None
        self._pieces.move_to_end((key, number))
        return piece

    def _read_to(self, key: _GroupKey, place: RowPlace) -> _Piece:
        """The piece with a row that is not kept: from where the reading stopped, or anew if the row lies before."""
        group = self._groups.setdefault(key, _Group())
        if place.row < group.position or (group.batches is None and not group.ended):
            self._start(key, place.shard)
            group = self._groups[key]
        try:
            while not group.ended:
                piece = self._next_piece(key, group)
                if place.row < piece.stop:
                    return piece
        except InputError:
            self._forget(key)
            raise
        raise too_few_rows(place.shard, group.position, place.shard.stop)

    def _start(self, key: _GroupKey, shard: Shard) -> None:
        """Open a row group at its start; what was kept of it goes, since the file may be another by now."""
        self.groups_read += 1
        self._forget(key)
        if len(self._open) == OPEN_GROUPS:
            self._open.popitem(last=False)[1].close()
        # what is kept is the whole row group, whatever shards were cut out of it
        batches = row_batches(shard, self._columns.names, self._batch_rows, stop=sys.maxsize)
        self._groups[key] = self._open[key] = _Group(batches=batches)

    def _forget(self, key: _GroupKey) -> None:
        group = self._groups.pop(key, None)
        self._open.pop(key, None)
        if group is not None:
            group.close()
            for number in range(len(group.starts)):
                piece = self._pieces.pop((key, number), None)
                self.cached_bytes -= 0 if piece is None else piece.bytes

    def _next_piece(self, key: _GroupKey, group: _Group) -> _Piece:
        """Read on; keeps the piece if there is room for it. At the end of the row group it may have no rows."""
        assert group.batches is not None, "only a row group that has ended or was never begun is closed here"
        piece = _Piece(group.position, group.position)
        self._open.move_to_end(key)
        for batch in group.batches:
            piece.append(batch)
            fits = self._make_room(piece.bytes)
            if not fits or piece.bytes >= self._cache_bytes // PIECES_IN_CACHE:
                break
        else:
            group.ended = True
            group.close()
            del self._open[key]
        group.position = piece.stop
        if piece.batches and piece.bytes <= self._cache_bytes:
            self._pieces[key, len(group.starts)] = piece
            self.cached_bytes += piece.bytes
        group.starts.append(piece.start)
        return piece

    def _make_room(self, size: int) -> bool:
        """Drop the least recently used pieces until `size` bytes fit; False where they never will."""
        if size > self._cache_bytes:
            return False
        while self._pieces and self.cached_bytes + size > self._cache_bytes:
            self.cached_bytes -= self._pieces.popitem(last=False)[1].bytes
        return True
