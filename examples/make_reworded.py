"""Writes the pairs that `make train` learns from: the pictures, with their captions said in another manner.

    python examples/make_reworded.py out/train

`train.parquet` and `eval.parquet` have the columns `id`, `image` and `response`, such as

    I can see two red circles above a blue square.

where the small model says "two red circles above a blue square". Every eighth picture is kept for the evaluation. The
broken rows are there, too, so that a run shows what becomes of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PICTURES = Path(__file__).resolve().parent / "pictures.parquet"
EVERY = 8


def reworded(caption: str) -> str:
    """A caption in the manner that is to be learnt."""
    return f"I can see {caption}."


def split(table: pa.Table) -> dict[str, pa.Table]:
    """The rows to train on and those to evaluate on, by the name of their file."""
    # The broken rows have no caption; their images fail before an answer is wanted.
    answers = [reworded(caption or "nothing") for caption in table["expected"].to_pylist()]
    pairs = table.select(["id", "image"]).append_column("response", pa.array(answers))
    held_out = [number % EVERY == 0 for number in range(len(pairs))]
    return {"train": pairs.filter(pa.array([not held for held in held_out])), "eval": pairs.filter(pa.array(held_out))}


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for train.parquet and eval.parquet")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name, table in split(pq.read_table(PICTURES)).items():
        path = options.output / f"{name}.parquet"
        pq.write_table(table, path, row_group_size=64)
        print(f"{path}: {len(table)} rows")


if __name__ == "__main__":
    main()
