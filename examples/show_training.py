"""Shows what `make train` did: captions before and after, beside the right ones, and the evaluation loss.

    python examples/show_training.py out/train/run

Reads `eval.jsonl` and `captions.jsonl` of an output folder of `jobs/train.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """A file of one JSON object a line."""
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run `make train` first")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def captions_table(before: Sequence[Line], after: Sequence[Line]) -> Table:
    """The captions of two evaluations side by side."""
    table = Table(title="Captions of pictures that were not trained on", title_justify="left", show_lines=True)
    for name in ("row", "before", "after", "expected"):
        table.add_column(name, overflow="fold")
    for old, new in zip(before, after, strict=True):
        style = "green" if new["caption"] == new["expected"] else "red"
        table.add_row(str(new["row"]), Text(old["caption"]), Text(new["caption"], style=style), Text(new["expected"]))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print everything; the status is 1 if there is nothing to show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="output folder of jobs/train.py")
    options = parser.parse_args(arguments)
    try:
        evaluations = read_lines(options.output / "eval.jsonl")
        captions = read_lines(options.output / "captions.jsonl")
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    first, last = evaluations[0], evaluations[-1]
    before, after = ([c for c in captions if c["step"] == line["step"]] for line in (first, last))

    console = Console()
    console.print(captions_table(before, after))
    for name, evaluation, said in (("before", first, before), ("after", last, after)):
        right = sum(caption["caption"] == caption["expected"] for caption in said)
        console.print(
            f"{name}, step {evaluation['step']}: evaluation loss {evaluation['loss']:.3f} over {evaluation['rows']} "
            f"rows; {right} of {len(said)} captions exactly right"
        )
    console.print(f"The curve is in {options.output / 'loss.png'}, the model in {options.output / 'final'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
