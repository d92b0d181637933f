"""Every bad input that is known to us, one row each, among a thousand good ones: each row has its own fate."""

from __future__ import annotations

import os
import re
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from ray_ministral import caption
from ray_ministral.captioning.request import PreparedChunk, PreparedRow
from ray_ministral.config import ImageLimits
from ray_ministral.data.shards import Shard
from ray_ministral.driver import tasks
from ray_ministral.driver.feeder import Feeder
from tests.cluster.inputs import huge_picture, make_config, picture, rows_of
from tests.cluster.processes import is_alive, wait_for
from tests.cluster.strikes import prepare_with

pytestmark = pytest.mark.usefixtures("clean_cluster")

GOOD = 1000
KINDS = 60
"""Different good pictures; their captions are known from a job that has nothing else."""
QUESTION = "What is in this picture?"
DEADLINE_S = 3.0
NAMES = ("eats", "never ends", "holds the GIL", "crashes")
DEADLY = {name: picture(5000 + seed) for seed, name in enumerate(NAMES)}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, *extra: tuple[bytes, bytes], rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def rgb() -> Image.Image:
    return Image.open(BytesIO(picture(2))).convert("RGB")


def odd_pictures() -> dict[str, bytes]:
    """What is a picture all the same, in a form that a loader gets wrong easily."""
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64))
    frames = [Image.new("P", (56, 56), colour) for colour in (1, 2, 3)]
    return {
        "EXIF orientation": encoded(rgb(), "JPEG", exif=turned),
        "16 bits": encoded(grey, "PNG"),
        "CMYK": encoded(rgb().convert("CMYK"), "JPEG"),
        "LA": encoded(rgb().convert("LA"), "PNG"),
        "transparent palette": encoded(rgb().convert("P"), "PNG", transparency=0),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }


Row = tuple[bytes | None, str | bytes | None, str, str]


def bad_rows() -> list[Row]:
    """Image, question, the status that it must have, and what its error must say."""
    bomb = zlib.compress(b"\x00" * 50_000_000, 9)
    cases: list[Row] = [
        (None, QUESTION, "bad_image", "is null"),
        (b"", QUESTION, "bad_image", "no bytes"),
        (b"not an image at all", QUESTION, "bad_image", "allowed format"),
        (picture(19)[:100], QUESTION, "bad_image", "cannot be decoded"),
        (encoded(rgb(), "JPEG")[:-200], QUESTION, "bad_image", "truncated"),
        (encoded(rgb(), "EPS"), QUESTION, "bad_image", "allowed format"),
        (png(8, 8, (b"zTXt", b"name\x00\x00" + bomb)), QUESTION, "bad_image", "PNG"),
        (huge_picture(), QUESTION, "too_large", "--max-image-pixels"),
        (png(1, 5_000_000), QUESTION, "too_large", "side above"),
        (png(2010, 10), QUESTION, "too_large", "200 times"),
        (picture(1), None, "prompt_error", "question"),
        (picture(1), "red[INST]", "prompt_error", r"\[INST\]"),
        (picture(1), b"\xff\xfe", "prompt_error", "not UTF-8"),
        (picture(1), "very " * 3000, "too_long", "tokens"),
        (DEADLY["eats"], QUESTION, "too_large", r"takes more than 2\d\d\d MiB of memory"),
        (DEADLY["never ends"], QUESTION, "engine_error", "longer than its deadline of 3 s"),
        (DEADLY["holds the GIL"], QUESTION, "engine_error", "longer than its deadline of 3 s"),
        (DEADLY["crashes"], QUESTION, "engine_error", "the worker that prepared this row died"),
    ]
    return cases


def write_rows(path: Path, images: list[bytes | None], questions: list[str | bytes | None], **options: Any) -> Path:
    raw = [text.encode() if isinstance(text, str) else text for text in questions]
    binary = pa.array(raw, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())  # not all of it is UTF-8
    table = pa.table({"id": range(len(images)), "image": pa.array(images, pa.binary()), "question": text})
    pq.write_table(table, path, **options)
    return path


def write_bomb(path: Path) -> Path:
    """A file of some kilobytes with 400 values of 1.5 MB each, and one that is above what a value may have."""
    numbers = pa.array([0] * 400 + [1], pa.int32())
    column = pa.DictionaryArray.from_arrays(numbers, pa.array([b"\x00" * 1_500_000, b"\x00" * 140_000_000]))
    table = pa.table({"id": range(401), "image": column, "question": [QUESTION] * 401})
    pq.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 50_000
    return path


def deadly_decoder(data: bytes) -> None:
    """What a decoder of `data` does before it decodes: mostly nothing."""
    if data == DEADLY["eats"]:
        eaten = []
        while len(eaten) < 512:  # 32 GiB in all, of addresses: nothing is written to them
            eaten.append(np.empty(64 << 20, np.uint8))
    elif data == DEADLY["never ends"]:
        ray.wait([ray.ObjectRef.from_random()], timeout=600)  # without the GIL, in C++
    elif data == DEADLY["holds the GIL"]:
        re.match("(a+)+$", "a" * 60 + "b")
    elif data == DEADLY["crashes"]:
        os.abort()


@pytest.mark.slow
def test_each_bad_row_has_its_own_error_and_a_thousand_good_ones_their_captions(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = odd_pictures()
    kinds = [*(picture(seed) for seed in range(KINDS - len(odd))), *odd.values()]
    known = write_rows(tmp_path / "known.parquet", list(kinds), [QUESTION] * KINDS)
    options: dict[str, Any] = {"prompt_column": "question", "stages": 1, "max_new_tokens": 4, "rows_per_shard": 100}
    options["columns"] = ("id",)  # a question that is not UTF-8 would be carried over as it is
    caption(make_config(model, known, tmp_path / "known", **options))
    expected = [row["caption"] for row in rows_of(tmp_path / "known")]
    assert {row["status"] for row in rows_of(tmp_path / "known")} == {"ok"}
    assert len(set(expected)) > 5

    # Good rows and, at even distances, the bad ones. Which kind each good row is: its index in `kinds`.
    cases, mixed = bad_rows(), []
    every = GOOD // len(cases)
    for number in range(GOOD):
        if number % every == every // 2 and number // every < len(cases):
            mixed.append(cases[number // every])
        mixed.append((kinds[number % KINDS], QUESTION, "ok", expected[number % KINDS]))
    assert len(mixed) == GOOD + len(cases)
    source = tmp_path / "input"
    source.mkdir()
    write_rows(source / "a.parquet", [row[0] for row in mixed], [row[1] for row in mixed], row_group_size=400)
    write_bomb(source / "b.parquet")

    monkeypatch.setattr(tasks, "prepare", prepare_with(deadly_decoder))
    limits = ImageLimits(deadline_s=DEADLINE_S)
    summary = caption(make_config(model, source, tmp_path / "out", images=limits, **options))

    rows = rows_of(tmp_path / "out")
    a, b = rows[: len(mixed)], rows[len(mixed) :]
    assert [row["id"] for row in a] == list(range(len(mixed))), "one row for each, in order"
    assert [row["id"] for row in b] == list(range(401))
    wrong = [(row, want[2:]) for row, want in zip(a, mixed, strict=True) if not is_as_wanted(row, want)]
    assert not wrong
    assert {row["status"] for row in b[:400]} == {"bad_image"}
    assert b[400]["status"] == "too_large"
    assert "140000000 bytes" in b[400]["error"]
    assert (summary.ok, summary.errors) == (GOOD, len(cases) + 401)
    assert (tmp_path / "out" / "_SUCCESS").exists()


def is_as_wanted(row: dict[str, Any], want: Row) -> bool:
    *_, status, words = want
    if status == "ok":
        return (row["status"], row["caption"], row["error"], row["attempts"]) == ("ok", words, None, 1)
    return row["status"] == status and row["caption"] is None and re.search(words, row["error"]) is not None


def stopping_prepare(pid_file: Path, *, at: int, between: bool) -> Callable[[Sequence[Shard]], Any]:
    """Starts tasks that yield a row a chunk, of which the first to come to row `at` is stopped there.

    `between`: after the chunk, before its pixels.
    """

    @ray.remote(num_cpus=0, num_returns="streaming", max_retries=0)
    def prepare(shards: Sequence[Shard]) -> Iterator[Any]:
        def stop_once(row: int) -> None:
            # of the first shard only: another worker is at the next one at the same time
            if shards[0].index == 0 and row == at and not pid_file.exists():
                time.sleep(0.5)  # what was yielded has arrived by then
                pid_file.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)

        for shard in shards:
            for row in range(shard.start, shard.stop):
                if not between:
                    stop_once(row)
                yield PreparedChunk(shard.index, (PreparedRow(row, np.zeros(1, np.int32), (), None),), 1)
                if between:
                    stop_once(row)
                yield f"pixels of {row}"

    return prepare.remote


@pytest.mark.parametrize("between", [False, True], ids=["before a chunk", "before its pixels"])
def test_a_preparing_worker_that_is_stopped_is_given_up(cluster: None, tmp_path: Path, between: bool) -> None:
    pid_file = tmp_path / "pid"
    shards = [Shard(index, "a", 0, index, 0, 20, "/a") for index in range(3)]
    feeder = Feeder(shards, stopping_prepare(pid_file, at=5, between=between))
    taken: list[tuple[int, int, str]] = []

    def take(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not until():
            assert time.monotonic() < deadline, taken
            prepared = feeder.take()
            if prepared is None:
                time.sleep(0.02)
            else:
                (row,) = prepared.chunk.rows
                assert row.failure is None
                taken.append((prepared.chunk.shard_index, row.row, ray.get(prepared.pixels)))

    take(lambda: len(taken) == 5 and pid_file.exists())
    assert feeder.take() is None, "to take from a stopped worker does not stop the driver"
    assert feeder.restart_stuck(3.0)
    take(lambda: feeder.exhausted)
    assert taken == [(shard, row, f"pixels of {row}") for shard in range(3) for row in range(20)]
    wait_for(lambda: not is_alive(int(pid_file.read_text())), 30, lambda: "the stopped worker is still there")
