"""Which files an input stands for, how they are cut, and what is refused about their columns."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from ray_ministral.data import files
from ray_ministral.data import shards as shards_module
from ray_ministral.data.files import find_files, locate, write_atomically, write_file
from ray_ministral.data.shards import Shard, plan_shards
from ray_ministral.errors import InputError


def write(path: Path, rows: int = 10, *, row_group_size: int = 10, **columns: pa.Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {"image": pa.array([b"x"] * rows, pa.binary()), "id": pa.array(range(rows), pa.int64()), **columns}
    )
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def names(*inputs: str | Path) -> list[str]:
    return [file.place.name for file in find_files([str(one) for one in inputs])]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`in/` with three files, three that are not to be seen, and one in a folder below; the current folder is above."""
    for name in ("b.parquet", "a.parquet", "c.pq", "deep/er/d.parquet"):
        write(tmp_path / "in" / name)
    for name in ("_SUCCESS", ".hidden.parquet", "_metadata", ".cache/x.parquet"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"not parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_folder_stands_for_its_files_at_any_depth(folder: Path) -> None:
    assert names("in") == ["in/a.parquet", "in/b.parquet", "in/c.pq", "in/deep/er/d.parquet"]
    assert names("in/") == names("in")
    assert names("./in") == names("in")
    os.chdir(folder)
    assert names(".") == ["a.parquet", "b.parquet", "c.pq", "deep/er/d.parquet"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("in/*.parquet", ["in/a.parquet", "in/b.parquet"]),
        ("in/[ac].p*", ["in/a.parquet", "in/c.pq"]),
        ("in/?.pq", ["in/c.pq"]),
        ("in/**/*.parquet", ["in/a.parquet", "in/b.parquet", "in/deep/er/d.parquet"]),
        ("in/*/*/*.parquet", ["in/deep/er/d.parquet"]),
        ("in/dee*", ["in/deep/er/d.parquet"]),
        ("*/c.pq", ["in/c.pq"]),
        ("in/.hidden*", ["in/.hidden.parquet"]),
    ],
)
def test_globs(folder: Path, pattern: str, expected: list[str]) -> None:
    assert names(pattern) == expected
    assert names(folder.parent / pattern) == [str(folder.parent / name) for name in expected]


def test_a_name_with_brackets_is_a_name_where_there_is_such_a_file(folder: Path) -> None:
    write(folder / "a[1].parquet")
    write(folder / "a1.parquet")
    assert names("in/a[1].parquet") == ["in/a[1].parquet"]


def test_each_file_once_and_sorted(folder: Path) -> None:
    assert names("in/c.pq", "in/*.parquet", folder / "b.parquet", "in") == [
        "in/a.parquet",
        "in/b.parquet",
        "in/c.pq",
        "in/deep/er/d.parquet",
    ]


def test_uris(folder: Path) -> None:
    write(folder / "with space" / "e f.parquet")
    root = folder.as_uri()
    assert names(f"{root}/a.parquet") == [str(folder / "a.parquet")]
    assert names(f"{root}/*.parquet") == [str(folder / "a.parquet"), str(folder / "b.parquet")]
    assert names(f"{root}/with%20space") == [str(folder / "with space" / "e f.parquet")]
    assert names(f"{root}/with%20space/*") == [str(folder / "with space" / "e f.parquet")]
    assert names(f"{root}/a.parquet", folder / "a.parquet") == [str(folder / "a.parquet")]


def test_a_remote_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a filesystem that is not the local one, behind a URI that pyarrow itself parses
    remote = pafs.SubTreeFileSystem(str(folder.parent), pafs.LocalFileSystem())
    seen = []

    class FakeFileSystem(pafs.FileSystem):
        @staticmethod
        def from_uri(uri: str) -> tuple[pafs.FileSystem, str]:
            seen.append(uri)
            return remote, uri.removeprefix("s3://key:secret@bucket/").partition("?")[0].replace("%20", " ")

    write(folder / "e f.parquet")
    monkeypatch.setattr(files, "pafs", SimpleNamespace(**{**vars(pafs), "FileSystem": FakeFileSystem}))
    for text in ("s3://key:secret@bucket/in?region=x", "s3://key:secret@bucket/in/*?region=x"):
        found = find_files([text])
        assert [file.place.name for file in found] == [
            f"s3://bucket/in/{name}" for name in ("a.parquet", "b.parquet", "c.pq", "deep/er/d.parquet", "e f.parquet")
        ]
        assert found[-1].place.location == "s3://key:secret@bucket/in/e%20f.parquet?region=x"
        assert found[-1].size == (folder / "e f.parquet").stat().st_size
        assert locate(found[-1].place.location).path == "in/e f.parquet"
    plan = plan_shards(["s3://key:secret@bucket/in/a*?region=x"], rows_per_shard=4)
    assert {shard.file for shard in plan.shards} == {"s3://bucket/in/a.parquet"}
    with pytest.raises(InputError) as caught:
        find_files(["s3://key:secret@bucket/nowhere?region=x"])
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="no file") as caught:
        find_files(["s3://key:secret@bucket/nowhere/*?region=x"])
    assert "secret" not in str(caught.value)
    assert all(uri.startswith("s3://key:secret@bucket/") for uri in seen)


def test_credentials_stay_out_of_the_name() -> None:
    place = locate("s3://key:secret@bucket/a%20b.parquet?region=eu-west-1")
    assert place.name == "s3://bucket/a b.parquet"
    assert place.path == "bucket/a b.parquet"
    assert "secret" in place.location
    assert not place.is_local


def test_credentials_stay_out_of_errors() -> None:
    with pytest.raises(InputError, match="ftp://host/x") as caught:
        locate("ftp://me:secret@host/x")
    assert "secret" not in str(caught.value)
    assert "s3" in str(caught.value)


@pytest.mark.parametrize("text", ["in/nothing.parquet", "nowhere/", "in/*.orc", "nowhere/*.parquet"])
def test_an_input_that_stands_for_nothing(folder: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"--input .*(does not exist|stands for no file)"):
        find_files([text])


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stands for no file"):
        find_files([str(tmp_path)])


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    write_file(locate(str(tmp_path)), "x", b"before")

    def fail(stream: pa.NativeFile) -> None:
        stream.write(b"half")
        raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_atomically(locate(str(tmp_path)), "x", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"before"
    write_file(locate(str(tmp_path)), "x", b"after")
    assert (tmp_path / "x").read_bytes() == b"after"


# --- shards ----------------------------------------------------------------------------------------------------------


def places(shards: tuple[Shard, ...]) -> list[tuple[int, int, int, int]]:
    return [(shard.file_index, shard.row_group, shard.start, shard.stop) for shard in shards]


def test_shards_slice_row_groups_and_never_cross_them(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 10, row_group_size=7)
    write(tmp_path / "b.parquet", 3)
    plan = plan_shards([str(tmp_path)], rows_per_shard=4)
    assert places(plan.shards) == [(0, 0, 0, 4), (0, 0, 4, 7), (0, 1, 0, 3), (1, 0, 0, 3)]
    assert [shard.index for shard in plan.shards] == [0, 1, 2, 3]
    assert [shard.part_name for shard in plan.shards] == [
        "part-00000-00000-00000000.parquet",
        "part-00000-00000-00000004.parquet",
        "part-00000-00001-00000000.parquet",
        "part-00001-00000-00000000.parquet",
    ]
    assert plan.rows == 13
    assert [file.row_group_rows for file in plan.files] == [(7, 3), (3,)]
    assert pickle.loads(pickle.dumps(plan)) == plan  # noqa: S301 our own bytes


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1, [(0, 0, 0, 1)]),
        (4, [(0, 0, 0, 4)]),
        (9, [(0, 0, 0, 4), (0, 0, 4, 7), (0, 1, 0, 2)]),
        (11, [(0, 0, 0, 4), (0, 0, 4, 7), (0, 1, 0, 3), (1, 0, 0, 1)]),
        (99, [(0, 0, 0, 4), (0, 0, 4, 7), (0, 1, 0, 3), (1, 0, 0, 3)]),
    ],
)
def test_limit_cuts_over_all_files(tmp_path: Path, limit: int, expected: list[tuple[int, int, int, int]]) -> None:
    write(tmp_path / "a.parquet", 10, row_group_size=7)
    write(tmp_path / "b.parquet", 3)
    plan = plan_shards([str(tmp_path)], rows_per_shard=4, limit=limit)
    assert places(plan.shards) == expected
    assert plan.rows == min(limit, 13)


def test_empty_files_and_row_groups(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 0)
    write(tmp_path / "c.parquet", 2)
    table = pq.read_table(tmp_path / "c.parquet")
    with pq.ParquetWriter(tmp_path / "b.parquet", table.schema) as writer:
        writer.write_table(table)
        writer.write_table(table.slice(0, 0))
        writer.write_table(table)
    plan = plan_shards([str(tmp_path)], rows_per_shard=100)
    assert plan.rows == 6
    assert all(shard.rows == 2 for shard in plan.shards)
    assert [shard.file_index for shard in plan.shards] == [1, 1, 2]
    assert plan_shards([str(tmp_path / "a.parquet")], rows_per_shard=1).shards == ()


def test_relative_names_and_absolute_locations(folder: Path) -> None:
    shard = plan_shards(["in/a.parquet"], rows_per_shard=100).shards[0]
    assert shard.file == "in/a.parquet"
    assert shard.location == str(folder / "a.parquet")


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"hello, I am text", b"PAR1" + b"\0" * 100 + b"\xff\xff\xff\x7fPAR1"]
)
def test_a_file_that_is_not_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "a.parquet")
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"notes\.txt cannot be read as a parquet file.*glob"):
        plan_shards([str(tmp_path)], rows_per_shard=10)


# --- columns ---------------------------------------------------------------------------------------------------------

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        IMAGE,
        pa.struct([("path", pa.string()), ("bytes", pa.large_binary())]),
        pa.list_(pa.binary()),
        pa.large_list(pa.large_binary()),
        pa.list_(IMAGE),
        pa.large_list(IMAGE),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.null(),
    ],
)
def test_image_types(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"image": pa.nulls(3, kind)}), tmp_path / "a.parquet")
    assert plan_shards([str(tmp_path)], rows_per_shard=10).rows == 3


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.int64(),
        pa.struct([("path", pa.string())]),
        pa.struct([("bytes", pa.string())]),
        pa.list_(pa.string()),
        pa.list_(pa.list_(pa.binary())),
        pa.list_(pa.uint8()),
        pa.map_(pa.string(), pa.binary()),
    ],
)
def test_types_that_hold_no_images(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"image": pa.nulls(3, kind), "n": [1, 2, 3]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: column 'image' is of type .*wanted binary.*'n' \(int64\)"):
        plan_shards([str(tmp_path)], rows_per_shard=10)


def test_a_missing_column_says_which_there_are(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    for wanted in ({"image_column": "picture"}, {"text_columns": ["title"]}, {"columns": ["title"]}):
        with pytest.raises(InputError, match=r"has no column '(picture|title)'.*it has 'image', 'id'"):
            plan_shards([str(tmp_path)], rows_per_shard=10, **wanted)


def test_every_file_is_checked(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.parquet")
    pq.write_table(pa.table({"image": ["text"], "id": [1]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet: column 'image' is of type string"):
        plan_shards([str(tmp_path)], rows_per_shard=10)


def test_doubled_columns_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([b"x"]), pa.array([b"y"])], names=["image", "image"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="2 columns called 'image'"):
        plan_shards([str(tmp_path)], rows_per_shard=10, columns=[])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.int8(), pa.float64(), pa.bool_(), pa.date32()])
def test_text_types(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path / "a.parquet", 2, title=pa.nulls(2, kind))
    assert plan_shards([str(tmp_path)], rows_per_shard=10, text_columns=["title"]).rows == 2


@pytest.mark.parametrize("kind", [pa.binary(), pa.list_(pa.string()), IMAGE, pa.timestamp("ns")])
def test_types_that_cannot_stand_in_a_prompt(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path / "a.parquet", 2, title=pa.nulls(2, kind))
    with pytest.raises(InputError, match="cannot stand in a prompt"):
        plan_shards([str(tmp_path)], rows_per_shard=10, text_columns=["title"])


def test_carried_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 2, title=pa.array(["a", "b"]))
    assert plan_shards([str(tmp_path)], rows_per_shard=9).carried_columns == ("id", "title")
    assert plan_shards([str(tmp_path)], rows_per_shard=9, columns=["title", "image"]).carried_columns == (
        "title",
        "image",
    )
    assert plan_shards([str(tmp_path)], rows_per_shard=9, columns=[]).carried_columns == ()


def test_a_carried_column_called_like_one_of_ours(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 2, caption=pa.array(["a", "b"]), token_ids=pa.array([[1], [2]]))
    with pytest.raises(InputError, match=r"\['caption'\].*--columns id --columns token_ids"):
        plan_shards([str(tmp_path)], rows_per_shard=9)
    assert plan_shards([str(tmp_path)], rows_per_shard=9, columns=["id", "token_ids"]).rows == 2
    with pytest.raises(InputError, match=r"\['token_ids'\]"):
        plan_shards([str(tmp_path)], rows_per_shard=9, columns=["id", "token_ids"], with_token_ids=True)


def test_files_with_other_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 2)
    write(tmp_path / "b.parquet", 2, title=pa.array(["a", "b"]))
    with pytest.raises(InputError, match=r"b\.parquet has the columns .*'title'.*--columns"):
        plan_shards([str(tmp_path)], rows_per_shard=9)
    assert plan_shards([str(tmp_path)], rows_per_shard=9, columns=["id"]).rows == 4


class _Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("nested", [False, True])
def test_pickled_extension_types_are_refused_and_not_unpickled(tmp_path: Path, nested: bool) -> None:
    trap = tmp_path / "unpickled"
    payload = pickle.dumps(_Trap(str(trap)))
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    field = pa.field("evil", pa.int64(), metadata=metadata)
    if nested:
        field = pa.field("evil", pa.list_(pa.struct([field])))
    schema = pa.schema([pa.field("image", pa.binary()), pa.field("id", pa.int64()), field])
    table = pa.Table.from_arrays([pa.array([b"x"]), pa.array([1]), pa.nulls(1, field.type)], schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"'evil' holds the extension type 'arrow.py_extension_type'.*--columns"):
        plan_shards([str(tmp_path)], rows_per_shard=9)
    assert plan_shards([str(tmp_path)], rows_per_shard=9, columns=["id"]).rows == 1
    assert not trap.exists()


def test_arrows_own_extension_types_are_carried(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 1, key=pa.array([b"0123456789abcdef"], pa.uuid()))
    assert plan_shards([str(tmp_path)], rows_per_shard=9).carried_columns == ("id", "key")


def test_a_footer_is_not_believed_any_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"image": [b"x"] * 11}), tmp_path / "a.parquet")
    monkeypatch.setattr(shards_module, "MAX_GROUP_ROWS", 10)
    with pytest.raises(InputError, match=r"says that a row group has 11 rows, at most 10 are believed"):
        plan_shards([str(tmp_path / "a.parquet")], rows_per_shard=5)
    monkeypatch.setattr(shards_module, "MAX_GROUP_ROWS", 11)
    assert plan_shards([str(tmp_path / "a.parquet")], rows_per_shard=5).rows == 11
