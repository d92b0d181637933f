"""Rows out of parquet and results into it: bounded memory, nothing lost or doubled, types kept."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_ministral.captioning.request import RowFailure, RowResult
from ray_ministral.data import parquet as parquet_module
from ray_ministral.data.files import locate
from ray_ministral.data.parquet import SourceRow, iter_rows
from ray_ministral.data.parts import PartInfo, read_part_info, write_part
from ray_ministral.data.shards import Shard, plan_shards
from ray_ministral.errors import InputError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, table: pa.Table, **options: object) -> Path:
    pq.write_table(table, path, **options)
    return path


def shards_of(path: Path, rows_per_shard: int = 100, **options: object) -> list[Shard]:
    return list(plan_shards([str(path)], rows_per_shard=rows_per_shard, **options).shards)


def read(path: Path, *, column: pa.Array | None = None, **options: object) -> list[SourceRow]:
    if column is not None:
        write(path, pa.table({"image": column}))
    return list(iter_rows(shards_of(path), image_column="image", **options))


def result(row: int, **changes: object) -> RowResult:
    base = RowResult(
        row=row,
        caption=f"caption {row}",
        status="ok",
        error=None,
        error_stage=None,
        finish_reason="stop",
        prompt_tokens=10 + row,
        image_tokens=8,
        completion_tokens=3,
        attempts=1,
        token_ids=(1, 2, row),
    )
    return replace(base, **changes)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_rows_know_their_shard_and_place(tmp_path: Path) -> None:
    table = pa.table({"image": [bytes([n]) for n in range(23)], "title": [f"t{n}" for n in range(23)]})
    path = write(tmp_path / "a.parquet", table, row_group_size=13)
    shards = shards_of(path, 5)
    first = [shard for shard in shards if shard.row_group == 0]
    rows = list(iter_rows(first, image_column="image", text_columns=["title"], batch_rows=4))
    assert [(row.shard.index, row.row) for row in rows] == [(n // 5, n) for n in range(13)]
    assert [row.images for row in rows] == [(bytes([n]),) for n in range(13)]
    assert [row.texts["title"] for row in rows] == [f"t{n}" for n in range(13)]
    second = [shard for shard in shards if shard.row_group == 1]
    assert [row.images for row in iter_rows(second, image_column="image")] == [(bytes([n]),) for n in range(13, 23)]


@pytest.mark.parametrize("batch_rows", [1, 3, 8, 100])
def test_shards_with_gaps(tmp_path: Path, batch_rows: int) -> None:
    path = write(tmp_path / "a.parquet", pa.table({"image": [bytes([n]) for n in range(20)]}))
    shards = shards_of(path, 4)
    rows = list(iter_rows([shards[1], shards[3]], image_column="image", batch_rows=batch_rows))
    assert [row.row for row in rows] == [4, 5, 6, 7, 12, 13, 14, 15]
    assert [row.images[0][0] for row in rows] == [row.row for row in rows]


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int16(), pa.binary())],
)
def test_bytes_of_every_type(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array([b"one", None, b"two"], pa.binary())
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    rows = read(tmp_path / "a.parquet", column=column)
    assert [row.images for row in rows] == [(b"one",), (), (b"two",)]
    assert rows[1].error is not None
    assert (rows[1].error.status, rows[1].error.stage) == ("bad_image", "read")


def test_structs_as_datasets_writes_them(tmp_path: Path) -> None:
    values = [{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    rows = read(tmp_path / "a.parquet", column=pa.array(values, IMAGE))
    assert rows[0].images == (b"x",)
    assert "path alone" in str(rows[1].error)
    assert "is null" in str(rows[2].error)


@pytest.mark.parametrize("make", [pa.list_, pa.large_list])
def test_lists(tmp_path: Path, make: type) -> None:
    rows = read(tmp_path / "a.parquet", column=pa.array([[b"x", b"y"], [], None, [b"x", None]], make(pa.binary())))
    assert [row.images for row in rows] == [(b"x", b"y"), (), (), ()]
    assert rows[1].error is None, "an empty list is a row of text alone"
    assert "is null" in str(rows[2].error)
    assert "image 1 of column 'image' is null" in str(rows[3].error)


def test_lists_of_structs(tmp_path: Path) -> None:
    values = [[{"bytes": b"x", "path": None}, {"bytes": b"y", "path": None}], [{"bytes": None, "path": "p"}], [None]]
    rows = read(tmp_path / "a.parquet", column=pa.array(values, pa.list_(IMAGE)))
    assert rows[0].images == (b"x", b"y")
    assert all(row.error is not None and row.error.status == "bad_image" for row in rows[1:])


def test_a_value_above_the_byte_limit_is_an_error_of_its_row(tmp_path: Path) -> None:
    column = pa.array([[b"x" * 100], [b"x" * 101], [b"x" * 60, b"y" * 60]], pa.list_(pa.binary()))
    rows = read(tmp_path / "a.parquet", column=column, max_value_bytes=100)
    assert rows[0].error is None
    for row, size in ((rows[1], 101), (rows[2], 120)):
        assert row.error is not None
        assert row.error.status == "too_large"
        assert f"{size} bytes" in str(row.error)
        assert row.images == ()


def test_texts(tmp_path: Path) -> None:
    columns = {
        "s": pa.array(["a", None]),
        "i": pa.array([7, None], pa.int16()),
        "f": pa.array([0.5, None]),
        "b": pa.array([True, None]),
        "d": pa.array([datetime.date(2026, 11, 24), None]),
        "m": pa.array([decimal.Decimal("1.50"), None]),
        "c": pa.array(["red", None]).dictionary_encode(),
        "v": pa.array(["view", None], pa.string_view()),
    }
    path = write(tmp_path / "a.parquet", pa.table({"image": [b"x", b"x"], **columns}))
    rows = read(path, text_columns=list(columns))
    assert {name: str(value) for name, value in rows[0].texts.items()} == {
        "s": "a",
        "i": "7",
        "f": "0.5",
        "b": "True",
        "d": "2026-11-24",
        "m": "1.50",
        "c": "red",
        "v": "view",
    }
    assert set(rows[1].texts.values()) == {None}


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"], pa.binary()).buffers())
    path = write(tmp_path / "a.parquet", pa.table({"image": [b"x", b"x"], "s": bad}))
    rows = read(path, text_columns=["s"])
    assert rows[0].texts["s"] == "ok"
    assert rows[1].error is not None
    assert rows[1].error.status == "prompt_error"
    assert "not UTF-8" in str(rows[1].error)


def test_text_above_the_byte_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.table({"image": [b"x"], "s": ["a" * 200]}))
    [row] = read(path, text_columns=["s"], max_value_bytes=100)
    assert row.error is not None
    assert row.error.status == "prompt_error"


def test_a_dotted_name_is_told_from_a_nested_one(tmp_path: Path) -> None:
    table = pa.table(
        {"image": pa.array([{"bytes": b"in", "path": "p"}], IMAGE), "image.bytes": ["dotted"], "image.path": [5]}
    )
    path = write(tmp_path / "a.parquet", table)
    [row] = read(path, text_columns=["image.bytes"])
    assert (row.images, row.texts["image.bytes"]) == ((b"in",), "dotted")
    shard = shards_of(path)[0]
    attempt = write_part(shard, [result(0)], output=str(tmp_path), carried_columns=["image.bytes", "image.path"])
    assert pq.read_table(tmp_path / attempt.name).to_pylist()[0]["image.path"] == 5


def test_a_small_file_that_becomes_large_is_read_in_small_pieces(tmp_path: Path) -> None:
    size, count = 1_500_000, 1000
    indices = pa.array(np.zeros(count, np.int32))
    column = pa.DictionaryArray.from_arrays(indices, pa.array([b"\x00" * size]))
    path = write(tmp_path / "a.parquet", pa.table({"image": column}), compression="zstd", store_schema=False)
    assert path.stat().st_size < 2500
    before = pa.total_allocated_bytes()
    peak = 0
    rows = 0
    tracemalloc.start()
    for row in iter_rows(shards_of(path), image_column="image"):
        rows += 1
        assert len(row.images[0]) == size
        peak = max(peak, pa.total_allocated_bytes() - before)
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == count
    assert peak < 32 * size, "Arrow must not hold the 1.5 GB that the file becomes"
    assert python_peak < 8 * size


def bomb(path: Path, values: int, column: str = "image") -> Path:
    """A file of a few kilobytes with values of 100 MB."""
    indices = pa.array(np.zeros(values, np.int32))
    large = pa.DictionaryArray.from_arrays(indices, pa.array([b"\x00" * 100_000_000]))
    table = pa.table({column: large} if column == "image" else {"image": [b"x"] * values, column: large})
    return write(path, table, compression="zstd", store_schema=False)


def test_a_page_that_unfolds_beyond_the_limit_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bomb(tmp_path / "a.parquet", 64)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(parquet_module, "READ_BYTES", 200 << 20)
    with pytest.raises(InputError, match=r"row group 0 takes more than 200 MiB of memory to read .*write_batch_size"):
        read(path)
    assert len(bytearray(1 << 30)) == 1 << 30, "the limit is gone"


def test_carried_columns_that_unfold_beyond_the_limit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_module, "READ_BYTES", 500 << 20)
    monkeypatch.setattr(parquet_module, "CARRIED_ROWS", 2)
    [shard] = shards_of(bomb(tmp_path / "a.parquet", 64, "text"))
    with pytest.raises(InputError, match=r"takes more than 500 MiB of memory to read .*leave large columns out"):
        parquet_module.read_columns(shard, ["text"])


def test_a_large_row_group_is_streamed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.bytes(100_000) for _ in range(300)]
    path = write(tmp_path / "a.parquet", pa.table({"image": images}), write_batch_size=8)
    before = pa.total_allocated_bytes()
    peak = 0
    for row, image in zip(iter_rows(shards_of(path), image_column="image"), images, strict=True):
        assert row.images == (image,)
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 8_000_000, "the column chunk has 30 MB"


def test_a_footer_that_promises_too_many_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.table({"image": [b"x"] * 5, "id": range(5)}))
    honest = shards_of(path)[0]
    liar = replace(honest, stop=9)
    with pytest.raises(InputError, match="has 5 rows where 9 were planned"):
        list(iter_rows([liar], image_column="image"))
    with pytest.raises(InputError, match="has 5 rows where 9 were planned"):
        write_part(liar, [result(row) for row in range(9)], output=str(tmp_path), carried_columns=["id"])
    with pytest.raises(InputError, match="1 row groups"):
        list(iter_rows([replace(honest, row_group=3)], image_column="image"))


def test_a_damaged_page_names_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = write(tmp_path / "a.parquet", pa.table({"image": [rng.bytes(1000) for _ in range(100)]}), compression="zstd")
    data = bytearray(path.read_bytes())
    data[40:4000] = b"\xff" * 3960
    shards = shards_of(path)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet: row group 0 cannot be read"):
        list(iter_rows(shards, image_column="image"))


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.table({"image": [b"x"]}))
    shards = shards_of(path)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        list(iter_rows(shards, image_column="image"))


def test_shards_of_two_row_groups_are_a_bug(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.table({"image": [b"x"] * 4}), row_group_size=2)
    with pytest.raises(ValueError, match="one row group"):
        list(iter_rows(shards_of(path), image_column="image"))
    [first, second] = shards_of(write(tmp_path / "b.parquet", pa.table({"image": [b"x"] * 4})), 2)
    with pytest.raises(ValueError, match="ascending"):
        list(iter_rows([second, first], image_column="image"))


# --- writing ---------------------------------------------------------------------------------------------------------


def columns_of_every_type() -> dict[str, pa.Array]:
    moment = datetime.datetime(2026, 11, 24, 4, 33, 7, 123456, tzinfo=datetime.UTC)
    labels = ["red", "blue", None, "red", "green", "blue"]
    return {
        "dictionary": pa.array(labels).dictionary_encode(),
        "dictionary8": pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0, 2, 1], pa.int8()), ["r", "b", "g"]),
        "nested_dictionary": pa.StructArray.from_arrays([pa.array(labels).dictionary_encode()], ["label"]),
        "list": pa.array([[1, 2], [], None, [3], [None], [4]], pa.list_(pa.int16())),
        "large_list": pa.array([["a"], [], None, ["b"], [None], []], pa.large_list(pa.string())),
        "struct": pa.array([{"x": 1, "y": {"z": "a"}}, None, {"x": None, "y": None}] * 2),
        "map": pa.array([[("a", 1)], [], None, [("b", None)], [], []], pa.map_(pa.string(), pa.int32())),
        "ns": pa.array([1, None, 3, 4, 5, 6], pa.timestamp("ns", tz="Europe/Berlin")),
        "us": pa.array([moment] * 6, pa.timestamp("us", tz="UTC")),
        "naive": pa.array([5] * 6, pa.timestamp("ms")),
        "date": pa.array([datetime.date(2026, 11, 24)] * 6),
        "time": pa.array([5] * 6, pa.time64("ns")),
        "duration": pa.array([5] * 6, pa.duration("us")),
        "decimal": pa.array([decimal.Decimal("1.50")] * 6, pa.decimal128(20, 2)),
        "large_string": pa.array(["a"] * 6, pa.large_string()),
        "view": pa.array(["a"] * 6, pa.string_view()),
        "fixed": pa.array([b"abcd"] * 6, pa.binary(4)),
        "fixed_list": pa.array([[1.0, 2.0]] * 6, pa.list_(pa.float32(), 2)),
        "half": pa.array(np.arange(6, dtype=np.float16)),
        "uint8": pa.array(range(6), pa.uint8()),
        "bool": pa.array([True, None, False] * 2),
        "null": pa.nulls(6),
        "uuid": pa.array([bytes(16)] * 6, pa.uuid()),
    }


def plain(column: pa.ChunkedArray) -> pa.Array:
    """The values, comparable whatever dictionary they are written with."""
    array = column.combine_chunks()
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def test_carried_columns_survive_exactly(tmp_path: Path) -> None:
    columns = columns_of_every_type()
    fields = [pa.field(name, column.type, metadata={b"note": name.encode()}) for name, column in columns.items()]
    fields.append(pa.field("required", pa.int64(), nullable=False))
    arrays = [*columns.values(), pa.array(range(6))]
    schema = pa.schema([pa.field("image", pa.binary()), *fields], metadata={b"pandas": b"{}", b"huggingface": b"{}"})
    source = write(tmp_path / "in.parquet", pa.Table.from_arrays([pa.array([b"x"] * 6), *arrays], schema=schema))
    original = pq.read_table(source)
    plan = plan_shards([str(source)], rows_per_shard=4)
    for shard in plan.shards:
        results = [result(row) for row in range(shard.start, shard.stop)]
        attempt = write_part(shard, results, output=str(tmp_path), carried_columns=plan.carried_columns)
        part = pq.read_table(tmp_path / attempt.name)
        assert part.schema.names[: len(fields)] == [field.name for field in fields]
        for field in fields:
            written = part.schema.field(field.name)
            assert written.type == original.schema.field(field.name).type, field.name
            assert written.nullable == field.nullable
            assert (written.metadata or {}).get(b"note") == (field.metadata or {}).get(b"note")
            assert plain(part.column(field.name)).equals(
                plain(original.column(field.name).slice(shard.start, shard.rows))
            )
        assert b"pandas" not in part.schema.metadata
        assert b"huggingface" not in part.schema.metadata


def test_many_batches_with_different_dictionaries(tmp_path: Path) -> None:
    labels = [f"label {n // 100}" for n in range(1000)]
    table = pa.table({"image": [b"x"] * 1000, "label": pa.array(labels).dictionary_encode()})
    path = write(tmp_path / "in.parquet", table)
    shard = shards_of(path, 1000)[0]
    results = [result(row) for row in range(1000)]
    attempt = write_part(shard, results, output=str(tmp_path), carried_columns=["label"])
    part = pq.read_table(tmp_path / attempt.name)
    assert part.column("label").to_pylist() == labels
    assert pa.types.is_dictionary(part.schema.field("label").type)


def test_the_output_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", pa.table({"image": [b"x"] * 7, "id": range(7)}), row_group_size=5)
    shard = shards_of(path, 3)[1]
    failure = RowFailure(status="bad_image", error="broken", stage="decode")
    results = [RowResult.failed(4, failure), result(3)]  # in any order
    attempt = write_part(shard, results, output=str(tmp_path), carried_columns=["id"], with_token_ids=True)
    assert attempt.name.startswith("_tmp.part-00000-00000-00000003.parquet.")
    part = pq.read_table(tmp_path / attempt.name)
    assert part.schema.names == [
        "id",
        "source_file",
        "source_row_group",
        "source_row",
        "caption",
        "status",
        "error",
        "error_stage",
        "finish_reason",
        "prompt_tokens",
        "image_tokens",
        "completion_tokens",
        "attempts",
        "token_ids",
    ]
    assert part.to_pylist() == [
        {
            "id": 3,
            "source_file": str(path),
            "source_row_group": 0,
            "source_row": 3,
            "caption": "caption 3",
            "status": "ok",
            "error": None,
            "error_stage": None,
            "finish_reason": "stop",
            "prompt_tokens": 13,
            "image_tokens": 8,
            "completion_tokens": 3,
            "attempts": 1,
            "token_ids": [1, 2, 3],
        },
        {
            "id": 4,
            "source_file": str(path),
            "source_row_group": 0,
            "source_row": 4,
            "caption": None,
            "status": "bad_image",
            "error": "broken",
            "error_stage": "decode",
            "finish_reason": None,
            "prompt_tokens": 0,
            "image_tokens": 0,
            "completion_tokens": 0,
            "attempts": 1,
            "token_ids": None,
        },
    ]
    expected = PartInfo(
        name="part-00000-00000-00000003.parquet",
        rows=2,
        status_counts={"ok": 1, "bad_image": 1},
        bytes=(tmp_path / attempt.name).stat().st_size,
    )
    assert attempt.info == expected
    assert attempt.sha256 == hashlib.sha256((tmp_path / attempt.name).read_bytes()).hexdigest()
    assert (attempt.info.ok, attempt.info.errors) == (1, 1)
    (tmp_path / attempt.name).rename(tmp_path / shard.part_name)
    assert read_part_info(locate(str(tmp_path)), shard.part_name) == expected


def test_no_carried_columns_and_no_token_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", pa.table({"image": [b"x"] * 2}))
    attempt = write_part(shards_of(path)[0], [result(0), result(1)], output=str(tmp_path), carried_columns=[])
    part = pq.read_table(tmp_path / attempt.name)
    assert part.schema.names[0] == "source_file"
    assert part.schema.names[-1] == "attempts"
    assert part.num_rows == 2


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 2, 2], [0, 1, 3], [0, 1, 2, 3], []])
def test_one_result_for_each_row(tmp_path: Path, rows: list[int]) -> None:
    path = write(tmp_path / "in.parquet", pa.table({"image": [b"x"] * 3}))
    with pytest.raises(ValueError, match="one result for each of the rows 0 up to 3"):
        write_part(shards_of(path)[0], [result(row) for row in rows], output=str(tmp_path), carried_columns=[])
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.parquet"]


def test_attempts_at_one_part_lie_side_by_side(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", pa.table({"image": [b"x"]}))
    out = tmp_path / "out"
    out.mkdir()
    shard = shards_of(path)[0]
    attempts = [
        write_part(shard, [result(0, caption=caption)], output=str(out), carried_columns=[])
        for caption in ("first", "second")
    ]
    assert {entry.name for entry in out.iterdir()} == {attempt.name for attempt in attempts}
    captions = [pq.read_table(out / attempt.name).column("caption").to_pylist() for attempt in attempts]
    assert captions == [["first"], ["second"]]


def test_an_input_that_lost_a_column(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", pa.table({"image": [b"x"], "id": [1]}))
    shard = shards_of(path)[0]
    write(path, pa.table({"image": [b"x"]}))
    with pytest.raises(InputError, match=r"no columns \['id'\] any more"):
        write_part(shard, [result(0)], output=str(tmp_path), carried_columns=["id"])
