"""Rows made ready: chunks in order, every bad row an error of its own, pixels and tokens that belong together."""

from __future__ import annotations

import re
import resource
import signal
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_ministral.captioning import prepare as prepare_module
from ray_ministral.captioning.prepare import prepare_shards
from ray_ministral.captioning.prompts import PromptTokenizer
from ray_ministral.captioning.request import Pixels, PreparedChunk, PreparedRow
from ray_ministral.config import ImageLimits, PromptConfig
from ray_ministral.data.images import ImagePreprocessor
from ray_ministral.data.shards import Shard, plan_shards
from ray_ministral.errors import InputError, ModelError
from tests.unit.model_directory import make_model_directory

PROMPT = PromptConfig(prompt="What?", system_prompt="s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("model"))


def encoded(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def shards_of(path: Path, columns: dict[str, Any], rows_per_shard: int = 100, **options: Any) -> list[Shard]:
    pq.write_table(pa.table(columns), path, **options)
    return list(plan_shards([str(path)], rows_per_shard=rows_per_shard).shards)


def run(folder: Path, shards: list[Shard], **changes: Any) -> list[tuple[PreparedChunk, Pixels]]:
    options = {"prompt": PROMPT, "images": ImageLimits(), "max_prompt_tokens": 1000} | changes
    items = list(prepare_shards(shards, model_dir=folder, **options))
    assert len(items) % 2 == 0
    pairs = list(zip(items[::2], items[1::2], strict=True))
    for chunk, pixels in pairs:
        assert isinstance(chunk, PreparedChunk)
        assert isinstance(pixels, list)
        assert len(chunk.rows) == len(pixels)
        assert chunk.pixel_bytes == sum(image.nbytes for images in pixels for image in images)
        for row, images in zip(chunk.rows, pixels, strict=True):
            assert row.image_sizes == tuple(image.shape[1:] for image in images)
            assert all(image.dtype == np.uint8 for image in images)
    return pairs


def rows_of(pairs: list[tuple[PreparedChunk, Pixels]]) -> list[PreparedRow]:
    return [row for chunk, _ in pairs for row in chunk.rows]


def test_rows_have_the_tokens_and_pixels_of_their_images(folder: Path, tmp_path: Path) -> None:
    sizes = [(28, 28), (100, 50), (300, 30), (60, 90)]
    images = [encoded(width, height, seed) for seed, (width, height) in enumerate(sizes)]
    pairs = run(folder, shards_of(tmp_path / "a.parquet", {"image": images}))
    [(chunk, pixels)] = pairs
    tokenizer, preprocessor = PromptTokenizer(folder), ImagePreprocessor(folder)
    for row, data, got in zip(chunk.rows, images, pixels, strict=True):
        expected = preprocessor.resize(Image.open(BytesIO(data)))
        assert np.array_equal(got[0], expected)
        assert row.token_ids is not None
        assert row.token_ids.tolist() == tokenizer.render("What?", [expected.shape[1:]], "s").tolist()
        merged = (expected.shape[1] // 28) * (expected.shape[2] // 28)
        assert (row.token_ids == tokenizer.image_token_id).sum() == merged


def test_chunks_are_of_one_shard_and_in_order(folder: Path, tmp_path: Path) -> None:
    shards = shards_of(tmp_path / "a.parquet", {"image": [encoded(28, 28)] * 12}, 5, row_group_size=8)
    pairs = run(folder, shards, chunk_rows=2)
    assert [(chunk.shard_index, [row.row for row in chunk.rows]) for chunk, _ in pairs] == [
        (0, [0, 1]),
        (0, [2, 3]),
        (0, [4]),
        (1, [5, 6]),
        (1, [7]),
        (2, [0, 1]),
        (2, [2, 3]),
    ]


def test_a_chunk_ends_when_its_pixels_are_many(folder: Path, tmp_path: Path) -> None:
    images = [encoded(112, 112), encoded(28, 28), encoded(28, 28), encoded(112, 112), encoded(28, 28)]
    pairs = run(folder, shards_of(tmp_path / "a.parquet", {"image": images}), chunk_bytes=3 * 112 * 112)
    assert [[row.row for row in chunk.rows] for chunk, _ in pairs] == [[0], [1, 2, 3], [4]]


def test_only_the_shards_that_are_asked_for(folder: Path, tmp_path: Path) -> None:
    images = [encoded(28, 28 * (1 + n % 4)) for n in range(9)]
    shards = shards_of(tmp_path / "a.parquet", {"image": images}, 3)
    pairs = run(folder, [shards[2]])
    assert [row.row for row in rows_of(pairs)] == [6, 7, 8]
    assert [row.image_sizes[0][0] for row in rows_of(pairs)] == [28 * (1 + n % 4) for n in (6, 7, 8)]


def test_a_bad_row_is_an_error_of_its_own(folder: Path, tmp_path: Path) -> None:
    good = encoded(40, 40)
    images = [good, good[: len(good) // 2], b"", None, b"%!PS-Adobe-3.0 EPSF", good, encoded(300, 300), good, good]
    titles = ["cat", "cat", "cat", "cat", "cat", "a [IMG] b", "cat", None, "dog"]
    shards = shards_of(tmp_path / "a.parquet", {"image": pa.array(images, pa.binary()), "title": titles})
    pairs = run(folder, shards, prompt=PromptConfig(prompt="A {title}?"), images=ImageLimits(max_pixels=10_000))
    failures = [row.failure and (row.failure.status, row.failure.stage) for row in rows_of(pairs)]
    assert failures == [
        None,
        ("bad_image", "decode"),
        ("bad_image", "decode"),
        ("bad_image", "read"),
        ("bad_image", "decode"),
        ("prompt_error", "template"),
        ("too_large", "decode"),
        ("prompt_error", "template"),
        None,
    ]
    assert all(row.failure is None or (row.failure.error and row.token_ids is None) for row in rows_of(pairs))
    assert [len(images) for _, pixels in pairs for images in pixels] == [1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_lists_of_images(folder: Path, tmp_path: Path) -> None:
    a, b = encoded(28, 56), encoded(84, 28)
    column = pa.array([[a, b], [], [a], None, [a, None], [a, b"no image"]], pa.list_(pa.binary()))
    rows = rows_of(run(folder, shards_of(tmp_path / "a.parquet", {"image": column})))
    assert [row.image_sizes for row in rows] == [((56, 28), (28, 84)), (), ((56, 28),), (), (), ()]
    assert [row.failure and row.failure.status for row in rows] == [
        None,
        None,
        None,
        "bad_image",
        "bad_image",
        "bad_image",
    ]
    tokenizer = PromptTokenizer(folder)
    assert rows[1].token_ids is not None
    assert rows[1].token_ids.tolist() == tokenizer.render("What?", (), "s").tolist()


def test_a_prompt_that_is_too_long(folder: Path, tmp_path: Path) -> None:
    shards = shards_of(tmp_path / "a.parquet", {"image": [encoded(28, 28), encoded(112, 112)]})
    fits = len(PromptTokenizer(folder).render("What?", [(28, 28)], "s"))
    first, second = rows_of(run(folder, shards, max_prompt_tokens=fits))
    assert first.failure is None
    assert second.failure is not None
    assert (second.failure.status, second.failure.stage) == ("too_long", "encode")
    assert f"has {fits + 18} tokens (20 of them for images), at most {fits} fit" in second.failure.error
    assert rows_of(run(folder, shards, max_prompt_tokens=fits - 1))[0].failure is not None


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (RecursionError("too deep"), "engine_error", "^RecursionError: too deep$"),
        (MemoryError("no room"), "too_large", r"more than \d+ MiB of memory \(no room\).*--max-image-pixels"),
    ],
)
def test_an_unexpected_exception_stays_with_its_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, words: str
) -> None:
    honest = prepare_module.open_image
    poison = encoded(30, 30, seed=9)

    def open_image(data: bytes, limits: ImageLimits) -> Image.Image:
        if data == poison:
            raise error
        return honest(data, limits)

    monkeypatch.setattr(prepare_module, "open_image", open_image)
    rows = rows_of(
        run(folder, shards_of(tmp_path / "a.parquet", {"image": [encoded(28, 28), poison, encoded(28, 28)]}))
    )
    assert [row.failure and row.failure.status for row in rows] == [None, status, None]
    assert rows[1].failure is not None
    assert rows[1].failure.stage == "decode"
    assert re.search(words, rows[1].failure.error)


def test_a_picture_that_takes_more_memory_than_it_may_costs_its_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageLimits, "decode_bytes", 100 << 20)
    stream = BytesIO()
    Image.new("RGB", (6000, 6000)).save(stream, "PNG", compress_level=1)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    pairs = run(folder, shards_of(tmp_path / "a.parquet", {"image": [encoded(28, 28), stream.getvalue()] * 2}))
    assert [row.failure and row.failure.status for row in rows_of(pairs)] == [None, "too_large", None, "too_large"]
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_job_has_no_limits_while_its_chunks_are_taken(folder: Path, tmp_path: Path) -> None:
    shards = shards_of(tmp_path / "a.parquet", {"image": [encoded(28, 28)] * 5})
    before = resource.getrlimit(resource.RLIMIT_DATA)
    count = 0
    for _ in prepare_shards(
        shards, model_dir=folder, prompt=PROMPT, images=ImageLimits(), max_prompt_tokens=1000, chunk_rows=2
    ):
        count += 1
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert count == 6


def test_a_prompt_column(folder: Path, tmp_path: Path) -> None:
    columns = {"image": [encoded(28, 28)] * 3, "q": ["Why {x}?", None, ""]}
    rows = rows_of(run(folder, shards_of(tmp_path / "a.parquet", columns), prompt=PromptConfig(prompt_column="q")))
    assert [row.failure and row.failure.status for row in rows] == [None, "prompt_error", None]
    assert rows[0].token_ids is not None
    assert "[IMG_END]Why {x}?[/INST]" in PromptTokenizer(folder)._tokenizer.decode(rows[0].token_ids.tolist())


def test_a_row_can_have_a_limit_of_its_own(folder: Path, tmp_path: Path) -> None:
    columns = {"image": [encoded(28, 28)] * 4, "most": pa.array([5, None, 0, 1], pa.int16())}
    rows = rows_of(run(folder, shards_of(tmp_path / "a.parquet", columns), limit_column="most"))
    assert [row.max_new_tokens for row in rows] == [5, None, None, 1]
    assert [row.failure and row.failure.status for row in rows] == [None, None, "prompt_error", None]
    assert rows[2].failure is not None
    assert "'most' is 0" in rows[2].failure.error


def test_what_is_wrong_with_the_model_or_the_file_is_raised(folder: Path, tmp_path: Path) -> None:
    shards = shards_of(tmp_path / "a.parquet", {"image": [encoded(28, 28)]})
    with pytest.raises(ModelError):
        run(tmp_path, shards)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(InputError):
        run(folder, shards)


def test_a_prepared_row_has_tokens_or_a_failure() -> None:
    with pytest.raises(ValueError, match="either token ids or a failure"):
        PreparedRow(row=0, token_ids=None, image_sizes=(), failure=None)
