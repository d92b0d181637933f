"""Which rows there are: input files cut into shards, the unit of reading, of output and of resuming.

Only footers are read here, and only what a footer says about rows and types is used; that it is true is checked when
the rows are read. Everything a user can mend about the input is refused here, before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from ray_ministral.data.columns import RowColumns, check_columns, output_columns, plain_columns
from ray_ministral.data.files import FoundFile, find_files
from ray_ministral.errors import ConfigError, InputError

FOOTERS_AT_ONCE = 16
MAX_GROUP_ROWS = 100_000_000
"""What is planned for each row is memory of the driver: a footer of a few bytes must not say how much of it."""


@dataclass(frozen=True)
class Shard:
    """A slice of one input row group: rows `start` up to `stop`, counted within the row group.

    `file` is the input's name as people see it and as `source_file` has it; `location` is what a process elsewhere
    opens (an absolute path or a URI, possibly with credentials: never shown, never written).
    """

    index: int
    file: str
    file_index: int
    row_group: int
    start: int
    stop: int
    location: str

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a shard needs at least one row, got rows {self.start} up to {self.stop}")

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.stop - self.start

    @property
    def part_name(self) -> str:
        """The name of its output file, which follows from its place alone."""
        return f"part-{self.file_index:05d}-{self.row_group:05d}-{self.start:08d}.parquet"


@dataclass(frozen=True)
class InputFile:
    """An input file as its footer describes it: `size` in bytes (None where unknown), rows of each row group."""

    name: str
    size: int | None
    row_group_rows: tuple[int, ...]


@dataclass(frozen=True)
class ShardPlan:
    """What a job reads: its shards in input order, all input files, and the columns that are carried over."""

    shards: tuple[Shard, ...]
    files: tuple[InputFile, ...]
    carried_columns: tuple[str, ...]

    @property
    def rows(self) -> int:
        """How many rows the job has, after `limit`."""
        return sum(shard.rows for shard in self.shards)


@dataclass(frozen=True)
class RowGroups:
    """Row groups, each as one shard, in input order, and the bytes of each: of the columns that are read, uncompressed.

    `bytes` is what the footers say, which may be wrong, and what a dictionary makes of them is larger: for planning.
    """

    shards: tuple[Shard, ...]
    bytes: tuple[int, ...]


@dataclass(frozen=True)
class _Footer:
    schema: pa.Schema
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]


def plan_shards(
    inputs: Sequence[str],
    *,
    rows_per_shard: int,
    limit: int | None = None,
    image_column: str = "image",
    text_columns: Sequence[str] = (),
    limit_column: str | None = None,
    columns: Sequence[str] | None = None,
    with_token_ids: bool = False,
) -> ShardPlan:
    """Cuts `inputs` (files, folders, globs, URIs) into shards of at most `rows_per_shard` rows.

    Files are sorted by name and taken once each; shards follow files, row groups and rows, and never cross a row
    group. `limit` keeps the first so many rows of all. `text_columns` are those that the prompt needs,
    `limit_column` the one with a row's most new tokens, `columns` those that are carried over: None means all but the
    image.

    Raises InputError for a file that is missing or not parquet, a column that is missing or of a type that cannot be
    used, files that do not have the same columns (where `columns` is None), and a carried column that is called like
    one of the output's own.
    """
    if rows_per_shard < 1:
        raise ConfigError(f"--rows-per-shard must be at least 1, got {rows_per_shard}")
    read = RowColumns(image=image_column, texts=tuple(text_columns), limit=limit_column)
    found, footers = _read_footers(inputs, read, "--input")
    carried = _carried_columns(
        found, footers, image_column=image_column, columns=columns, with_token_ids=with_token_ids
    )
    for file, footer in zip(found, footers, strict=True):
        check_columns(file.place.name, footer.schema, read, carried=carried)
    shards = _cut(found, footers, rows_per_shard, limit)
    files = tuple(
        InputFile(name=file.place.name, size=file.size, row_group_rows=footer.group_rows)
        for file, footer in zip(found, footers, strict=True)
    )
    return ShardPlan(shards=shards, files=files, carried_columns=carried)


def plan_row_groups(inputs: Sequence[str], columns: RowColumns, *, option: str) -> RowGroups:
    """The row groups of `inputs` that have rows: for reading rows in any order.

    Raises InputError as `plan_shards` does; it says that `option` is to be mended.
    """
    found, footers = _read_footers(inputs, columns, option)
    for file, footer in zip(found, footers, strict=True):
        check_columns(file.place.name, footer.schema, columns)
    shards = _cut(found, footers, rows_per_shard=None, limit=None)
    return RowGroups(shards, tuple(footers[shard.file_index].group_bytes[shard.row_group] for shard in shards))


def _cut(
    found: Sequence[FoundFile], footers: Sequence[_Footer], rows_per_shard: int | None, limit: int | None
) -> tuple[Shard, ...]:
    """Shards of at most `rows_per_shard` rows, or of whole row groups; only the first `limit` rows of all."""
    shards: list[Shard] = []
    left = limit
    for file_index, (file, footer) in enumerate(zip(found, footers, strict=True)):
        for row_group, rows in enumerate(footer.group_rows):
            taken = rows if left is None else min(rows, left)
            left = None if left is None else left - taken
            step = rows_per_shard or max(1, taken)
            for start in range(0, taken, step):
                shards.append(
                    Shard(
                        index=len(shards),
                        file=file.place.name,
                        file_index=file_index,
                        row_group=row_group,
                        start=start,
                        stop=min(start + step, taken),
                        location=file.place.location,
                    )
                )
    return tuple(shards)


def _read_footers(inputs: Sequence[str], columns: RowColumns, option: str) -> tuple[list[FoundFile], list[_Footer]]:
    found = find_files(inputs, option=option)
    with ThreadPoolExecutor(max_workers=FOOTERS_AT_ONCE) as pool:
        return found, list(pool.map(partial(_read_footer, columns=columns, option=option), found))


def _read_footer(file: FoundFile, columns: RowColumns, option: str) -> _Footer:
    """The schema of a file, and of each row group its rows and the bytes of `columns`. Raises InputError."""
    try:
        with file.place.filesystem.open_input_file(file.place.path) as source:
            parquet = pq.ParquetFile(source, pre_buffer=False)
            metadata = parquet.metadata
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            footer = _Footer(
                schema=parquet.schema_arrow,
                group_rows=tuple(int(group.num_rows) for group in groups),
                group_bytes=tuple(_bytes_of(group, columns.names) for group in groups),
            )
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{file.place.name} cannot be read as a parquet file: {error}; take it out of {option} (a folder stands "
            "for all its files; a glob such as folder/*.parquet chooses)"
        ) from error
    if any(count < 0 for count in footer.group_rows):
        raise InputError(
            f"{file.place.name} has a damaged footer: a row group with {min(footer.group_rows)} rows; write the file "
            "anew"
        )
    if max(footer.group_rows, default=0) > MAX_GROUP_ROWS:
        raise InputError(
            f"the footer of {file.place.name} says that a row group has {max(footer.group_rows)} rows, at most "
            f"{MAX_GROUP_ROWS} are believed; it is damaged, or the file is to be written with smaller row groups"
        )
    return footer


def _bytes_of(group: pq.RowGroupMetaData, names: Sequence[str]) -> int:
    """Uncompressed bytes of the columns `names` with all that is inside them."""
    columns = (group.column(index) for index in range(group.num_columns))
    return sum(
        max(0, column.total_uncompressed_size)
        for column in columns
        if any(column.path_in_schema == name or column.path_in_schema.startswith(f"{name}.") for name in names)
    )


def _carried_columns(
    found: Sequence[FoundFile],
    footers: Sequence[_Footer],
    *,
    image_column: str,
    columns: Sequence[str] | None,
    with_token_ids: bool,
) -> tuple[str, ...]:
    """The columns that are carried over, in the order of the option, or of the first file. Raises InputError."""
    if columns is not None:
        carried = tuple(dict.fromkeys(columns))
    else:
        first = footers[0].schema.names
        for file, footer in zip(found, footers, strict=True):
            if set(footer.schema.names) != set(first):
                raise InputError(
                    f"{file.place.name} has the columns {sorted(footer.schema.names)}, but {found[0].place.name} has "
                    f"{sorted(first)}: name the ones to carry over with --columns, or caption them in two jobs"
                )
        carried = tuple(name for name in first if name != image_column)
    taken = sorted(set(carried) & set(output_columns(with_token_ids=with_token_ids)))
    if taken:
        raise InputError(
            f"the input has columns called {taken}, as the output's own are: choose the ones to carry over with "
            f"--columns (such as {plain_columns(carried, taken)}), or rename them"
        )
    return carried
