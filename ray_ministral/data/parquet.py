"""Rows out of parquet files.

Reading goes in small batches over a column chunk that is streamed, so that memory follows the file's pages and the size
of a few rows, and not what a footer says. (A page is read whole. pyarrow's writer looks at a page's size only every
`write_batch_size` values, 1024 unless told otherwise, so large images in a file that it wrote may share huge pages.)
What a page or a dictionary unfolds to is held by `READ_BYTES`: a file that wants more is refused.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_ministral.data.columns import RowColumns, is_list, is_string
from ray_ministral.data.files import locate
from ray_ministral.data.limits import memory_limit
from ray_ministral.data.shards import Shard
from ray_ministral.errors import BadImageError, InputError, PromptError, RowError, TooLargeError

READ_ROWS = 8
"""Rows that are read at once: images are large, and a dictionary can hold one value of megabytes for every row."""
CARRIED_ROWS = 256
READ_BUFFER_BYTES = 1 << 20
MAX_VALUE_BYTES = 128 << 20
READ_BYTES = 6 << 30
"""Memory that reading a batch may add to the process, and carried columns of a shard may have. The largest page that
parquet knows is 2 GiB, once packed and once unpacked, and its values are copied out of it."""

TextValue = str | int | float | bool | None


@dataclass(frozen=True, eq=False)
class SourceRow:
    """One row as it was read: encoded images, the values for the prompt, or the error that came of reading it.

    `row` counts within the row group. `images` is empty for a row with an empty list. `messages` is the value of the
    messages column as Python has it: a text, or lists and dictionaries.
    """

    shard: Shard
    row: int
    images: tuple[bytes, ...]
    texts: Mapping[str, TextValue]
    error: RowError | None
    messages: object = None


def iter_rows(
    shards: Sequence[Shard],
    *,
    image_column: str,
    text_columns: Sequence[str] = (),
    limit_column: str | None = None,
    batch_rows: int = READ_ROWS,
    max_value_bytes: int = MAX_VALUE_BYTES,
) -> Iterator[SourceRow]:
    """The rows of `shards`, which lie in one row group in ascending order, read in one pass.

    A null or missing image, a row whose images have more than `max_value_bytes` together and text that is not UTF-8
    become the row's `error`. Raises InputError where the file cannot be read or has fewer rows than its footer says.
    """
    _require_one_row_group(shards)
    first = shards[0]
    columns = RowColumns(image=image_column, texts=tuple(text_columns), limit=limit_column)
    pending = list(shards)
    position = 0
    for batch in row_batches(first, columns.names, batch_rows, stop=shards[-1].stop):
        for offset in range(batch.num_rows):
            row = position + offset
            while pending and row >= pending[0].stop:
                pending.pop(0)
            if not pending:
                return
            if row >= pending[0].start:
                yield source_row(pending[0], row, batch, offset, columns, max_value_bytes)
        position += batch.num_rows
    if position < shards[-1].stop:
        raise too_few_rows(first, position, shards[-1].stop)


def _require_one_row_group(shards: Sequence[Shard]) -> None:
    if not shards:
        raise ValueError("no shards to read")
    places = {(shard.location, shard.row_group) for shard in shards}
    ascending = all(a.stop <= b.start for a, b in pairwise(shards))
    if len(places) != 1 or not ascending:
        raise ValueError(f"wanted ascending shards of one row group, got {[shard.part_name for shard in shards]}")


@contextmanager
def _reading(shard: Shard) -> Iterator[None]:
    """Turns what pyarrow raises about a file into an InputError that names file and row group."""
    try:
        yield
    except MemoryError as error:  # before ArrowException, of which Arrow's own MemoryError is one, too
        raise _too_large(shard, str(error) or "no memory") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{shard.file}: row group {shard.row_group} cannot be read: {error}; check the file, or take it out of "
            "the input"
        ) from error


def _too_large(shard: Shard, reason: str) -> InputError:
    return InputError(
        f"{shard.file}: row group {shard.row_group} takes more than {READ_BYTES >> 20} MiB of memory to read "
        f"({reason}): write it with smaller pages (pyarrow: a lower write_batch_size and data_page_size) and values, "
        "leave large columns out with --columns, lower --rows-per-shard, or take it out of the input"
    )


def row_batches(shard: Shard, columns: Sequence[str], batch_rows: int, *, stop: int) -> Generator[pa.RecordBatch]:
    """The shard's row group in batches of `batch_rows` rows, from its first row until row `stop` has been read.

    Raises InputError where the file cannot be read, or not within `READ_BYTES`. It may have fewer rows: see
    `too_few_rows`.
    """
    place = locate(shard.location)
    with _reading(shard), place.filesystem.open_input_file(place.path) as source:
        # A buffer makes Arrow stream a column chunk instead of holding it whole; pre_buffer would undo that.
        parquet = pq.ParquetFile(source, pre_buffer=False, buffer_size=READ_BUFFER_BYTES)
        if shard.row_group >= parquet.metadata.num_row_groups:
            raise InputError(
                f"{shard.file} has {parquet.metadata.num_row_groups} row groups, but had more when the job was "
                "planned: it changed; start the job anew with another --output"
            )
        position = 0
        batches = parquet.iter_batches(
            batch_size=batch_rows, row_groups=[shard.row_group], columns=list(columns), use_threads=False
        )
        while True:
            with memory_limit(READ_BYTES):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            position += batch.num_rows
            if position >= stop:
                return


def too_few_rows(shard: Shard, found: int, wanted: int) -> InputError:
    """What to raise where a row group has fewer rows than its footer said."""
    return InputError(
        f"{shard.file}: row group {shard.row_group} has {found} rows where {wanted} were planned: its footer is wrong, "
        "or it changed while the job ran; write it anew and start with another --output"
    )


def source_row(
    shard: Shard,
    row: int,
    batch: pa.RecordBatch,
    offset: int,
    columns: RowColumns,
    max_value_bytes: int = MAX_VALUE_BYTES,
) -> SourceRow:
    """Row `offset` of `batch`, which is row `row` of its row group. What is wrong with it becomes its `error`.

    A null image is wrong, save beside a conversation, which says itself how many images belong to it.
    """
    images: tuple[bytes, ...] = ()
    texts: dict[str, TextValue] = {}
    messages: object = None
    error: RowError | None = None
    try:
        for name in columns.values:
            texts[name] = _text(batch.column(name)[offset], name, max_value_bytes)
        if columns.messages is not None:
            messages = _messages(batch.column(columns.messages), offset, columns.messages, max_value_bytes)
        image = batch.column(columns.image)[offset]
        if image.is_valid or columns.messages is None:
            images = _images(image, columns.image, max_value_bytes)
    except RowError as failure:
        error = failure
    return SourceRow(shard=shard, row=row, images=images, texts=texts, error=error, messages=messages)


def _messages(column: pa.Array, offset: int, name: str, max_value_bytes: int) -> object:
    """The conversation in one value, plain Python. Raises PromptError."""
    if is_string(column.type):
        return _text(column[offset], name, max_value_bytes)
    size = column.slice(offset, 1).nbytes
    if size > max_value_bytes:
        raise PromptError(f"column {name!r} has {size} bytes, at most {max_value_bytes} are read", stage="read")
    try:
        return column[offset].as_py()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"column {name!r} is not UTF-8: {error.reason} at byte {error.start}", stage="read"
        ) from error


def _text(scalar: pa.Scalar, column: str, max_value_bytes: int) -> TextValue:
    if pa.types.is_dictionary(scalar.type):
        scalar = scalar.value if scalar.is_valid else pa.scalar(None, type=scalar.type.value_type)
    if not scalar.is_valid:
        return None
    if hasattr(scalar, "as_buffer") and (size := scalar.as_buffer().size) > max_value_bytes:
        raise PromptError(
            f"column {column!r} has {size} bytes of text, at most {max_value_bytes} are read", stage="read"
        )
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"column {column!r} is not UTF-8: {error.reason} at byte {error.start}", stage="read"
        ) from error
    return value if isinstance(value, str | int | float | bool) else str(value)


def _images(scalar: pa.Scalar, column: str, max_value_bytes: int) -> tuple[bytes, ...]:
    """The encoded images of one value of the image column. Raises BadImageError, TooLargeError."""
    if not scalar.is_valid:
        raise BadImageError(f"column {column!r} is null", stage="read")
    many = is_list(scalar.type)
    scalars: Sequence[Any] = list(scalar.values) if many else [scalar]
    buffers = []
    for index, item in enumerate(scalars):
        where = f"image {index} of column {column!r}" if many else f"column {column!r}"
        buffers.append(_encoded(item, where))
    size = sum(buffer.size for buffer in buffers)
    if size > max_value_bytes:
        raise TooLargeError(
            f"column {column!r} has {size} bytes of encoded images, at most {max_value_bytes} are read", stage="read"
        )
    return tuple(buffer.to_pybytes() for buffer in buffers)


def _encoded(scalar: pa.Scalar, where: str) -> pa.Buffer:
    if not scalar.is_valid:
        raise BadImageError(f"{where} is null", stage="read")
    if pa.types.is_struct(scalar.type):
        scalar = scalar["bytes"]
        if not scalar.is_valid:
            raise BadImageError(f"{where} has no bytes (a path alone is not followed)", stage="read")
    if pa.types.is_dictionary(scalar.type):
        scalar = scalar.value
    return scalar.as_buffer()


def read_columns(shard: Shard, columns: Sequence[str]) -> pa.Table:
    """`columns` of the shard's rows, with the file's own types and field metadata, in the order asked for.

    Raises InputError where the file cannot be read, has lost a column, or has fewer rows than were planned, and where
    the columns have more than `READ_BYTES`.
    """
    with _reading(shard):
        place = locate(shard.location)
        with place.filesystem.open_input_file(place.path) as source:
            schema = pq.ParquetFile(source, pre_buffer=False).schema_arrow
    lost = [name for name in columns if name not in schema.names]
    if lost:
        raise InputError(
            f"{shard.file} has no columns {lost} any more: it changed; start the job anew with another --output"
        )
    fields = [schema.field(name) for name in columns]
    if not fields:
        return pa.table({})
    pieces: list[pa.RecordBatch] = []
    position = size = 0
    for batch in row_batches(shard, columns, CARRIED_ROWS, stop=shard.stop):
        start, stop = max(shard.start - position, 0), min(shard.stop - position, batch.num_rows)
        if start < stop:
            # a dotted name can match inside another column, too, so the columns are picked out again by name
            pieces.append(batch.select(list(columns)).slice(start, stop - start))
            size += pieces[-1].nbytes
            if size > READ_BYTES:
                raise _too_large(shard, f"columns {', '.join(columns)}, rows {shard.start} to {shard.stop}")
        position += batch.num_rows
    if position < shard.stop:
        raise too_few_rows(shard, position, shard.stop)
    table = pa.Table.from_batches(pieces)
    # batches do not carry the fields' metadata and nullability
    return pa.Table.from_arrays(table.columns, schema=pa.schema(fields))
