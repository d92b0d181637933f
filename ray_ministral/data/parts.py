"""Parts: the output file of a shard, with its carried-over columns and, beside them, what became of each row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ray_ministral.data.columns import output_fields
from ray_ministral.data.files import Location, locate, typed_full_disk, write_temporary
from ray_ministral.data.parquet import read_columns
from ray_ministral.data.shards import Shard
from ray_ministral.errors import InputError

OK_STATUS = "ok"
STATUS_COUNTS_KEY = b"ray_ministral.status_counts"


class OutputRow(Protocol):
    """What `write_part` needs to know of a row's result (`captioning.request.RowResult` has it)."""

    @property
    def row(self) -> int: ...
    @property
    def caption(self) -> str | None: ...
    @property
    def status(self) -> str: ...
    @property
    def error(self) -> str | None: ...
    @property
    def error_stage(self) -> str | None: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def image_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def attempts(self) -> int: ...
    @property
    def token_ids(self) -> tuple[int, ...] | None: ...


@dataclass(frozen=True)
class PartInfo:
    """A part: its name, size in bytes, and how many of its rows have which status."""

    name: str
    rows: int
    status_counts: Mapping[str, int]
    bytes: int

    @property
    def ok(self) -> int:
        """Rows with a caption."""
        return self.status_counts.get(OK_STATUS, 0)

    @property
    def errors(self) -> int:
        """Rows without one."""
        return self.rows - self.ok


@dataclass(frozen=True)
class Attempt:
    """A part that is written and not committed: what it will be, its temporary name, SHA-256 of its bytes in hex."""

    info: PartInfo
    name: str
    sha256: str


def write_part(
    shard: Shard,
    results: Sequence[OutputRow],
    *,
    output: str,
    carried_columns: Sequence[str],
    with_token_ids: bool = False,
) -> Attempt:
    """Writes an attempt at the part of `shard` into the folder `output`: carried columns, then the results.

    It lies there whole, on local disks synced, under a temporary name of its own: the driver alone gives a part its
    final name, with `Ledger.commit`. The carried columns are read again from the input and keep their types. `results`
    are in any order, exactly one for each row; ValueError else, since that is a bug of the caller and no row may be
    lost or doubled. Raises InputError where the input cannot be read any more, OutputError where there is no room for
    the output, OSError where it cannot be written for another reason; nothing is left behind then.
    """
    by_row = {result.row: result for result in results}
    wanted = range(shard.start, shard.stop)
    if len(by_row) != len(results) or by_row.keys() != set(wanted):
        missing = sorted(set(wanted) - by_row.keys())
        surplus = sorted(by_row.keys() - set(wanted))
        raise ValueError(
            f"{shard.part_name} wants one result for each of the rows {shard.start} up to {shard.stop}, got "
            f"{len(results)} for {len(by_row)} rows; without a result: {missing[:5]}, not of this shard: {surplus[:5]}"
        )
    ordered = [by_row[row] for row in wanted]
    carried = read_columns(shard, carried_columns)
    own = _own_columns(shard, ordered, with_token_ids=with_token_ids)
    counts: dict[str, int] = {}
    for result in ordered:
        counts[result.status] = counts.get(result.status, 0) + 1
    fields = [*carried.schema, *output_fields(with_token_ids=with_token_ids)]
    # Not the input's own metadata: what pandas and `datasets` note there about columns is not true of these columns.
    schema = pa.schema(fields, metadata={STATUS_COUNTS_KEY: json.dumps(counts, sort_keys=True).encode()})
    table = pa.Table.from_arrays([*carried.columns, *own], schema=schema)

    def fill(stream: pa.NativeFile) -> None:
        with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
            writer.write_table(table, row_group_size=max(1, table.num_rows))

    folder = locate(output)
    with typed_full_disk(folder.child(shard.part_name).name):
        written = write_temporary(folder, shard.part_name, fill)
    info = PartInfo(name=shard.part_name, rows=len(ordered), status_counts=counts, bytes=written.bytes)
    return Attempt(info=info, name=written.name, sha256=written.sha256)


def read_part_info(folder: Location, name: str) -> PartInfo:
    """What the footer of a committed part says. Raises InputError where it is no part of ours, or damaged."""
    place = folder.child(name)
    try:
        with place.filesystem.open_input_file(place.path) as source:
            size = int(source.size())
            metadata = pq.ParquetFile(source, pre_buffer=False).metadata
        rows = int(metadata.num_rows)
        counts = {str(k): int(v) for k, v in json.loads((metadata.metadata or {})[STATUS_COUNTS_KEY]).items()}
        if sum(counts.values()) != rows:
            raise ValueError(f"it has {rows} rows, but counts {sum(counts.values())}")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{place.name} is not a part that can be built on ({error}): delete it, and its rows are captioned again"
        ) from error
    return PartInfo(name=name, rows=rows, status_counts=counts, bytes=size)


def read_failed_rows(output: str, name: str) -> tuple[int, ...]:
    """The rows of a committed part, counted within the row group, that have no caption. Raises InputError."""
    return tuple(row["row"] for row in read_own_columns(output, name) if row["status"] != OK_STATUS)


def read_own_columns(output: str, name: str) -> list[dict[str, Any]]:
    """What a committed part says became of each row: a dictionary with the keys of `OutputRow`.

    `token_ids` is None where the part has no such column. Raises InputError where it cannot be read.
    """
    place = locate(output).child(name)
    keys = [field.name for field in output_fields(with_token_ids=True) if field.name in OutputRow.__dict__]
    try:
        with place.filesystem.open_input_file(place.path) as source:
            file = pq.ParquetFile(source, pre_buffer=False)
            stored = [key for key in keys if key in file.schema_arrow.names]
            columns = file.read(columns=["source_row", *stored]).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{place.name} cannot be read ({error}): delete it, and its rows are captioned again"
        ) from error
    rows = columns["source_row"]
    return [
        {"row": row, "token_ids": None} | {key: columns[key][index] for key in stored} for index, row in enumerate(rows)
    ]


def _own_columns(shard: Shard, results: Sequence[OutputRow], *, with_token_ids: bool) -> list[pa.Array]:
    values: dict[str, list[object]] = {
        "source_file": [shard.file] * len(results),
        "source_row_group": [shard.row_group] * len(results),
        "source_row": [result.row for result in results],
    }
    return [
        pa.array(values.get(field.name) or [getattr(result, field.name) for result in results], type=field.type)
        for field in output_fields(with_token_ids=with_token_ids)
    ]
