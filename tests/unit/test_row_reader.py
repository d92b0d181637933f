"""Rows in any order: the right ones, whatever the cache, and never more memory than allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_ministral.data.columns import RowColumns
from ray_ministral.data.parquet import SourceRow
from ray_ministral.data.row_reader import OPEN_GROUPS, RowIndex, RowPlace, RowReader
from ray_ministral.data.shards import Shard, plan_row_groups
from ray_ministral.errors import InputError
from ray_ministral.training.order import SampleOrder

COLUMNS = RowColumns(image="image", texts=("title",))
IMAGE_BYTES = 1000


def image(number: int) -> bytes:
    return np.random.default_rng(number).bytes(IMAGE_BYTES)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Rows 0 to 99 in two files, in row groups of 30, 30, 10 and of 30."""
    folder = tmp_path_factory.mktemp("rows")
    for name, start, stop in (("a", 0, 70), ("b", 70, 100)):
        rows = range(start, stop)
        table = pa.table({"image": [image(n) for n in rows], "title": [f"t{n}" for n in rows]})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=30)
    return [str(folder)]


def index_of(files: list[str], columns: RowColumns = COLUMNS) -> RowIndex:
    groups = plan_row_groups(files, columns, option="--train")
    return RowIndex(groups.shards, groups.bytes)


def number_of(row: SourceRow) -> int:
    assert row.error is None
    number = int(str(row.texts["title"])[1:])
    assert row.images == (image(number),)
    return number


def test_rows_are_numbered_through_files_and_row_groups(files: list[str]) -> None:
    index = index_of(files)
    assert len(index) == 100
    assert index.group_rows == (30, 30, 10, 30)
    places = [index.place(number) for number in (0, 29, 30, 69, 70, 99)]
    assert [(place.shard.file[-9:], place.shard.row_group, place.row) for place in places] == [
        ("a.parquet", 0, 0),
        ("a.parquet", 0, 29),
        ("a.parquet", 1, 0),
        ("a.parquet", 2, 9),
        ("b.parquet", 0, 0),
        ("b.parquet", 0, 29),
    ]
    for wrong in (-1, 100):
        with pytest.raises(IndexError):
            index.place(wrong)
    assert len(RowIndex([])) == 0


def test_shards_need_not_be_whole_row_groups() -> None:
    shards = [Shard(0, "a", 0, 0, 5, 8, "/a"), Shard(1, "a", 0, 0, 20, 21, "/a"), Shard(2, "a", 0, 3, 0, 2, "/a")]
    index = RowIndex(shards)
    places = [index.place(number) for number in range(len(index))]
    assert [(place.shard.index, place.row) for place in places] == [(0, 5), (0, 6), (0, 7), (1, 20), (2, 0), (2, 1)]


# all, nothing, one row group of 30 rows, almost two, and as much as one batch
@pytest.mark.parametrize("cache_bytes", [10**9, 0, 45_000, 60_000, 9_000])
@pytest.mark.parametrize("batch_rows", [1, 7, 8, 64])
def test_the_right_rows_in_bounded_memory(files: list[str], cache_bytes: int, batch_rows: int) -> None:
    index = index_of(files)
    reader = RowReader(COLUMNS, cache_bytes=cache_bytes, batch_rows=batch_rows)
    rng = np.random.default_rng(0)
    for _ in range(25):
        numbers = rng.integers(0, 100, rng.integers(1, 20)).tolist()  # some of them twice
        rows = reader.read([index.place(number) for number in numbers])
        assert [number_of(row) for row in rows] == numbers
        assert reader.cached_bytes <= cache_bytes
        assert reader.cached_bytes == sum(piece.bytes for piece in reader._pieces.values())


def test_row_groups_that_are_kept_are_not_read_again(files: list[str]) -> None:
    index = index_of(files)
    everything = [index.place(number) for number in range(100)]
    reader = RowReader(COLUMNS)
    for _ in range(3):
        reader.read(everything)
    assert reader.groups_read == 4
    assert 100 * IMAGE_BYTES < reader.cached_bytes < 200 * IMAGE_BYTES

    nothing_kept = RowReader(COLUMNS, cache_bytes=0)
    for _ in range(3):
        nothing_kept.read(everything)
    assert nothing_kept.groups_read == 12


def test_the_least_recently_used_makes_room(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_ministral.data.row_reader.PIECES_IN_CACHE", 1)  # a row group is one piece
    index = index_of(files)
    first, second, third = (index.place(number) for number in (0, 30, 70))
    one_group = RowReader(COLUMNS)
    one_group.read([first])
    reader = RowReader(COLUMNS, cache_bytes=int(2.5 * one_group.cached_bytes))
    for place in (first, second, first, third):
        reader.read([place])
    assert reader.groups_read == 3
    reader.read([first])
    assert reader.groups_read == 3, "it was used after the second"
    reader.read([second])
    assert reader.groups_read == 4


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Rows 0 to 2399 in six files of one row group of 400 rows."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(6):
        rows = range(400 * number, 400 * (number + 1))
        table = pa.table({"image": [image(n) for n in rows], "title": [f"t{n}" for n in rows]})
        pq.write_table(table, folder / f"{number}.parquet")
    return [str(folder)]


def test_row_groups_larger_than_the_cache_are_read_once_in_windows(large: list[str]) -> None:
    index = index_of(large)
    assert index.shard_bytes[0] > 400 * IMAGE_BYTES
    order = SampleOrder(2400, 0, group_rows=index.group_rows, window=100)
    reader = RowReader(COLUMNS, cache_bytes=250 * IMAGE_BYTES)
    for step in range(75):
        numbers = order.step_samples(step, 32)
        assert [number_of(row) for row in reader.read([index.place(number) for number in numbers])] == list(numbers)
        assert reader.cached_bytes <= 250 * IMAGE_BYTES
    assert reader.groups_read == 6


def test_few_files_stay_open(large: list[str]) -> None:
    index = index_of(large)
    reader = RowReader(COLUMNS, cache_bytes=100 * IMAGE_BYTES)
    rng = np.random.default_rng(0)
    opened = []
    for _ in range(20):
        numbers = rng.integers(0, 2400, 8).tolist()
        assert [number_of(row) for row in reader.read([index.place(number) for number in numbers])] == numbers
        opened.append(sum(group.batches is not None for group in reader._groups.values()))
    assert max(opened) == OPEN_GROUPS


def test_a_row_group_that_cannot_be_read_is_an_error_each_time(files: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [image(n) for n in range(900)], "title": ["t0"] * 900}), path)
    place = index_of([str(path)]).place(800)
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    data[half : half + 10_000] = b"\xff" * 10_000
    path.write_bytes(data)
    reader = RowReader(COLUMNS, cache_bytes=10**6)
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be read"):
            reader.read([place])
    assert reader.cached_bytes == 0


def test_a_row_that_cannot_be_used_is_an_error_of_its_own(tmp_path: Path) -> None:
    column = pa.array([b"x", None, b"y" * 101], pa.binary())
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    columns = RowColumns(image="image")
    index = index_of([str(tmp_path)], columns)
    rows = RowReader(columns, max_value_bytes=100).read([index.place(number) for number in (2, 0, 1)])
    assert [row.error and row.error.status for row in rows] == ["too_large", None, "bad_image"]


def test_a_file_that_changed(files: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [image(0)] * 9, "title": ["t0"] * 9}), path)
    place = index_of([str(path)]).place(8)
    pq.write_table(pa.table({"image": [image(0)] * 4, "title": ["t0"] * 4}), path)
    for cache_bytes in (0, 10**6):
        with pytest.raises(InputError, match="has 4 rows where 9 were planned"):
            RowReader(COLUMNS, cache_bytes=cache_bytes).read([place])
    reader = RowReader(COLUMNS)
    reader.read([RowPlace(place.shard, 3)])
    with pytest.raises(InputError, match="has 4 rows where 9 were planned"):
        reader.read([place])
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        RowReader(COLUMNS).read([place])


# --- columns of training ---------------------------------------------------------------------------------------------

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
PARTS = pa.struct(
    [("role", pa.string()), ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())])))]
)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.list_(MESSAGE), [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]),
        (pa.large_list(MESSAGE), [{"role": "user", "content": "x"}]),
        (pa.list_(PARTS), [{"role": "user", "content": [{"type": "image", "text": None}]}]),
        (pa.string(), '[{"role": "user"}]'),
        (pa.large_string(), "[]"),
        (pa.string_view(), "[]"),
        (pa.dictionary(pa.int32(), pa.string()), "[]"),
        (pa.list_(MESSAGE), []),
        (pa.list_(MESSAGE), None),
        (pa.string(), None),
    ],
)
def test_conversations_are_read_as_they_are(tmp_path: Path, kind: pa.DataType, value: Any) -> None:
    column = pa.array([value, value], kind.value_type if pa.types.is_dictionary(kind) else kind)
    table = pa.table({"image": pa.array([b"x", None], pa.binary()), "m": column.cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    columns = RowColumns(image="image", messages="m")
    index = index_of([str(tmp_path)], columns)
    rows = RowReader(columns).read([index.place(0), index.place(1)])
    assert [row.messages for row in rows] == [value, value]
    # a conversation says itself how many images it shows
    assert [row.images for row in rows] == [(b"x",), ()]
    assert [row.error for row in rows] == [None, None]


def test_a_conversation_above_the_byte_limit(tmp_path: Path) -> None:
    long = [[{"role": "user", "content": "x" * size}] for size in (60, 200, 10)]
    pq.write_table(pa.table({"image": [b""] * 3, "m": pa.array(long, pa.list_(MESSAGE))}), tmp_path / "a.parquet")
    columns = RowColumns(image="image", messages="m")
    index = index_of([str(tmp_path)], columns)
    rows = RowReader(columns, max_value_bytes=150).read([index.place(number) for number in range(3)])
    assert [row.error and (row.error.status, row.error.stage) for row in rows] == [None, ("prompt_error", "read"), None]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (RowColumns(image="picture"), "no column 'picture', which --image-column needs"),
        (RowColumns(image="title"), "holds no images"),
        (RowColumns(image="image", texts=("question",)), "no column 'question', which the prompt needs"),
        (RowColumns(image="image", response="answer"), "no column 'answer', which --response-column needs"),
        (RowColumns(image="image", response="image"), "cannot stand in a prompt"),
        (RowColumns(image="image", messages="m"), "no column 'm', which --messages-column needs"),
        (RowColumns(image="image", limit="n"), "no column 'n', which --max-new-tokens-column needs"),
        (RowColumns(image="image", limit="title"), "column 'title' is of type string, wanted whole numbers"),
        (RowColumns(image="image", messages="image"), "holds no conversation; wanted a list of structs"),
    ],
)
def test_columns_that_cannot_be_used(files: list[str], columns: RowColumns, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_row_groups(files, columns, option="--train")


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.string()), pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())])), pa.int64()]
)
def test_types_that_hold_no_conversation(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"image": [b""], "m": pa.array([None], kind)}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="holds no conversation"):
        plan_row_groups([str(tmp_path)], RowColumns(image="image", messages="m"), option="--train")


def test_errors_name_the_option(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--eval .* does not exist"):
        plan_row_groups([str(tmp_path / "nowhere.parquet")], COLUMNS, option="--eval")
    with pytest.raises(InputError, match=r"--eval .* stands for no file"):
        plan_row_groups([str(tmp_path)], COLUMNS, option="--eval")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="take it out of --eval"):
        plan_row_groups([str(tmp_path)], COLUMNS, option="--eval")
