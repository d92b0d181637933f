"""Writes the pictures that the quick start's small model learns from: parquet files of images and conversations.

    python examples/make_pairs.py --output out/model/pairs

The columns are `image` (an encoded file) and `messages` (a list of {role, content}: sometimes a system prompt, a
question, the caption). Every picture is drawn from the seed and its own number, so the same seed gives the same
pictures however many processes draw them. Digits are of the training's samples only.
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from make_tokenizer import PROMPTS, SYSTEM_PROMPTS
from pictures import DigitSample, draw_picture, load_digit_samples
from PIL import Image

FILE_PICTURES = 8192
GROUP_PICTURES = 512
# How often each kind of scene is drawn: more of what is harder to learn than a user's pictures have.
KINDS: Mapping[str, int] = {"lone": 2, "counted": 3, "above": 4, "beside": 5, "digit": 4}
SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), nullable=False),
    ]
)

Row = dict[str, object]


@dataclass(frozen=True)
class Pairs:
    """Which pictures: `count` of them, from `seed`."""

    count: int = 163_840
    seed: int = 0

    @property
    def num_files(self) -> int:
        """Files of `FILE_PICTURES` pictures; the last one may have fewer."""
        return -(-self.count // FILE_PICTURES)

    def rows(self, file: int, digits: Sequence[DigitSample]) -> list[Row]:
        """The rows of a file, counted from 0."""
        start = file * FILE_PICTURES
        return [pair(self.seed, number, digits) for number in range(start, min(start + FILE_PICTURES, self.count))]


def pair(seed: int, number: int, digits: Sequence[DigitSample]) -> Row:
    """A picture, a question about it and its caption, drawn from the seed and the picture's number alone."""
    rng = random.Random(f"train {seed} {number}")
    picture = draw_picture(rng, None, digits, KINDS)
    system = [rng.choice(SYSTEM_PROMPTS)] if rng.random() < 0.25 else []
    # The project's default prompt is what most users will send.
    prompt = PROMPTS[0] if rng.random() < 0.5 else rng.choice(PROMPTS)
    said = [*(("system", text) for text in system), ("user", prompt), ("assistant", picture.caption)]
    return {
        "image": as_a_file(rng, picture.image),
        "messages": [{"role": role, "content": content} for role, content in said],
    }


def as_a_file(rng: random.Random, image: Image.Image) -> bytes:
    """The image as an encoded file: two in five go through JPEG or WEBP, as the users' pictures do."""
    kind = rng.choice(("png", "png", "png", "jpeg", "webp"))
    options = {
        "png": {"compress_level": 4},
        "jpeg": {"quality": rng.randint(85, 97)},
        "webp": {"quality": rng.randint(85, 97), "method": 0},
    }[kind]
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@functools.cache
def _digits() -> list[DigitSample]:
    return load_digit_samples("train")


def write_file(pairs: Pairs, file: int, folder: Path) -> Path:
    """Writes one file, whole or not at all, unless it is there already."""
    path = folder / f"pairs-{file:03d}.parquet"
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        table = pa.Table.from_pylist(pairs.rows(file, _digits()), schema=SCHEMA)
        pq.write_table(
            table, temporary, row_group_size=GROUP_PICTURES, compression={"image": "none", "messages": "zstd"}
        )
        temporary.rename(path)
    return path


def write_pairs(pairs: Pairs, folder: Path) -> None:
    """Writes all files that `folder` lacks, a process for each core."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        for path in pool.map(functools.partial(write_file, pairs, folder=folder), range(pairs.num_files)):
            print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    """Reads the options and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--count", type=int, default=Pairs.count, help="how many pictures")
    parser.add_argument("--seed", type=int, default=Pairs.seed, help="of the pictures")
    options = parser.parse_args()
    write_pairs(Pairs(options.count, options.seed), options.output)


if __name__ == "__main__":
    main()
