"""Writes the quick start's input: a parquet file of held-out pictures with their captions, a few broken on purpose.

    python examples/make_data.py --output examples/pictures.parquet

The columns are `id` (int64), `image` ({bytes, path}, as the `datasets` library writes images) and `expected` (the
right caption; null where the image is broken). The same versions of Pillow and pyarrow write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pictures import DigitSample, draw_picture, load_digit_samples
from PIL import Image

GOOD_ROWS = 300
ROWS_PER_GROUP = 64
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.field("expected", pa.string()),
    ],
    # What `datasets` needs to show the column as images.
    metadata={
        "huggingface": json.dumps(
            {
                "info": {
                    "features": {
                        "id": {"dtype": "int64", "_type": "Value"},
                        "image": {"_type": "Image"},
                        "expected": {"dtype": "string", "_type": "Value"},
                    }
                }
            }
        )
    },
)

Row = dict[str, object]


def encode(image: Image.Image, kind: str) -> bytes:
    """The image as a PNG, JPEG (quality 95) or WEBP (quality 92) file."""
    file = BytesIO()
    options = {"png": {"optimize": True}, "jpeg": {"quality": 95}, "webp": {"quality": 92, "method": 4}}[kind]
    image.save(file, kind, **options)
    return file.getvalue()


def good_row(number: int, digits: Sequence[DigitSample]) -> Row:
    """A held-out picture, drawn from its number alone."""
    rng = random.Random(f"bundled {number}")
    picture = draw_picture(rng, None, digits)
    kind = rng.choice(("png", "jpeg", "webp"))
    suffix = {"png": "png", "jpeg": "jpg", "webp": "webp"}[kind]
    return {
        "image": {"bytes": encode(picture.image, kind), "path": f"picture-{number:04d}.{suffix}"},
        "expected": picture.caption,
    }


def broken_rows() -> list[Row]:
    """Images as they go wrong in the wild; each must become an error in its own row and touch no other."""
    bomb = BytesIO()
    # 88 million pixels in 23 kB: one bit each, all alike. As RGB it would take 265 MB.
    Image.new("1", (9400, 9400), 1).save(bomb, "png", optimize=True)
    whole = encode(Image.linear_gradient("L").convert("RGB"), "png")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n0 0 100 100 rectfill\n%%EOF\n"
    return [
        {"image": {"bytes": whole[: len(whole) // 2], "path": "truncated.png"}},
        {"image": {"bytes": b"This is not an image but a note about one.\n", "path": "note.jpg"}},
        {"image": None},
        {"image": {"bytes": b"", "path": "empty.png"}},
        {"image": {"bytes": bomb.getvalue(), "path": "bomb.png"}},
        {"image": {"bytes": postscript, "path": "postscript.jpg"}},
    ]


def bundled_rows(digits: Sequence[DigitSample]) -> list[Row]:
    """All rows in their order: the broken ones stand spread among the good ones."""
    rows = [good_row(number, digits) for number in range(GOOD_ROWS)]
    broken = broken_rows()
    for number, row in enumerate(broken):
        rows.insert(17 + number * (GOOD_ROWS // len(broken)), {**row, "expected": None})
    return [{"id": number, **row} for number, row in enumerate(rows)]


def write_pictures(output: Path, digits: Sequence[DigitSample]) -> None:
    """Writes the parquet file, in row groups of `ROWS_PER_GROUP` rows."""
    table = pa.Table.from_pylist(bundled_rows(digits), schema=SCHEMA)
    # The images are compressed already.
    pq.write_table(table, output, row_group_size=ROWS_PER_GROUP, compression="zstd")


def main() -> None:
    """Reads the options and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "pictures.parquet")
    output: Path = parser.parse_args().output
    write_pictures(output, load_digit_samples("held-out"))
    print(f"{output}: {pq.read_metadata(output).num_rows} rows, {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
