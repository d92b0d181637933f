"""Input files for the cluster tests, with good and bad rows, and the output folders read back."""

from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from ray_ministral.config import CaptionConfig, PipelineConfig, PromptConfig, SamplingConfig

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ((112, 112), (84, 112), (56, 56), (150, 90), (40, 200))


def picture(seed: int) -> bytes:
    """A PNG with coloured shapes; sizes vary, so that several image sizes meet in a batch."""
    rng = random.Random(seed)
    width, height = SIZES[seed % len(SIZES)]
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 3)):
        x, y, side = rng.randrange(width // 2), rng.randrange(height // 2), rng.randint(15, 40)
        shape = rng.choice((draw.ellipse, draw.rectangle))
        shape((x, y, x + side, y + side), fill=rng.choice(COLOURS))
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def huge_picture() -> bytes:
    """A PNG of few bytes and 81 million pixels."""
    stream = BytesIO()
    Image.new("1", (9000, 9000)).save(stream, "PNG")
    return stream.getvalue()


GOOD_ROWS = 40
BAD_PICTURES: dict[int, tuple[bytes | None, str]] = {
    3: (None, "bad_image"),
    11: (b"", "bad_image"),
    19: (picture(19)[:100], "bad_image"),
    27: (huge_picture(), "too_large"),
    44: (b"not an image at all", "bad_image"),
}


def write_pictures(path: Path, rows: int = GOOD_ROWS + len(BAD_PICTURES), *, bad: bool = True) -> Path:
    """Columns `id`, `image` (bytes), `question`, `weight`; two row groups; `BAD_PICTURES` among them."""
    images = [BAD_PICTURES[row][0] if bad and row in BAD_PICTURES else picture(row) for row in range(rows)]
    table = pa.table(
        {
            "id": pa.array(range(1000, 1000 + rows), pa.int64()),
            "image": pa.array(images, pa.binary()),
            "question": [f"What is in picture {row}?" for row in range(rows)],
            "weight": pa.array([row / 7 for row in range(rows)], pa.float32()),
        }
    )
    pq.write_table(table, path, row_group_size=max(1, (rows + 1) // 2))
    return path


BAD_ALBUMS = {2: "bad_image", 9: "prompt_error", 13: "prompt_error", 17: "too_long", 21: "bad_image"}


def write_albums(path: Path) -> Path:
    """Columns `image` (list of {bytes, path}), `colour`, `id`: up to three pictures a row; `BAD_ALBUMS` among them."""
    albums: list[list[dict[str, Any] | None] | None] = []
    colours: list[str | None] = []
    for row in range(26):
        albums.append([{"bytes": picture(100 + row + n), "path": None} for n in range(row % 4)])
        colours.append(COLOURS[row % len(COLOURS)])
    albums[2] = [{"bytes": picture(1), "path": None}, None]
    colours[9] = None
    colours[13] = "red[INST]"
    colours[17] = "very " * 1500
    albums[21] = None
    type_ = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(
        pa.table({"image": pa.array(albums, type_), "colour": colours, "id": [f"row {row}" for row in range(26)]}), path
    )
    return path


def make_config(model: Path, source: Path, output: Path, **changes: Any) -> CaptionConfig:
    """A small job; options of the parts of the config are told apart by their names."""
    parts: dict[str, dict[str, Any]] = {"prompt": {}, "sampling": {"max_new_tokens": 24}, "pipeline": {}, "": {}}
    kinds = {"prompt": PromptConfig, "sampling": SamplingConfig, "pipeline": PipelineConfig}
    for name, value in changes.items():
        owners = [part for part, kind in kinds.items() if name in kind.__dataclass_fields__]
        parts[owners[0] if owners else ""][name] = value
    parts["pipeline"].setdefault("threads_per_stage", 1)
    made = {part: kind(**parts[part]) for part, kind in kinds.items()}
    own = {"rows_per_shard": 8, "address": "local"} | parts[""]
    return CaptionConfig(model=str(model), inputs=(str(source),), output=str(output), **made, **own)


def read_output(output: Path) -> pa.Table:
    """All parts of an output folder, in order of their names."""
    return pa.concat_tables([pq.read_table(part) for part in sorted(output.glob("part-*.parquet"))])


def rows_of(output: Path) -> list[dict[str, Any]]:
    """The output rows as dictionaries."""
    rows: list[dict[str, Any]] = read_output(output).to_pylist()
    return rows
