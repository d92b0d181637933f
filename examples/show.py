"""Shows what the quick start made: captions beside the right ones, the broken rows, and how many are exactly right.

    python examples/show.py out/caption

Reads the parts and the summary that `jobs/caption.py` wrote for examples/pictures.parquet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_ministral.driver.summary import CaptionSummary, as_table

COLUMNS = ["id", "expected", "caption", "status", "error"]
Row = dict[str, object]


def read_rows(output: Path) -> list[Row]:
    """All rows of an output folder, in input order."""
    parts = sorted(output.glob("part-*.parquet"))
    if not parts:
        raise FileNotFoundError(f"no part-*.parquet in {output}: run `make caption` first")
    return [row for part in parts for row in pq.read_table(part, columns=COLUMNS).to_pylist()]


def is_right(row: Row) -> bool:
    """Whether a caption is, letter for letter, the expected one."""
    return row["caption"] == row["expected"]


def pick(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` captioned rows spread evenly over the input, and every wrong one within the same number."""
    step = max(1, len(rows) // count)
    wrong = [row for row in rows if not is_right(row)][:count]
    spread = [row for row in rows[::step][:count] if row not in wrong]
    return spread + wrong


def captions_table(rows: Sequence[Row]) -> Table:
    """Captions beside what they should be."""
    table = Table(title="Captions", title_justify="left")
    for name in ("id", "caption", "expected", ""):
        table.add_column(name, overflow="fold")
    for row in rows:
        verdict = Text("right", style="green") if is_right(row) else Text("wrong", style="red")
        table.add_row(str(row["id"]), Text(str(row["caption"])), Text(str(row["expected"])), verdict)
    return table


def broken_table(rows: Sequence[Row]) -> Table:
    """Rows that could not be captioned, with the reason."""
    table = Table(title="Rows that were broken on purpose", title_justify="left")
    for name in ("id", "status", "error"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(str(row["id"]), Text(str(row["status"])), Text(str(row["error"])))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print everything; the status is 1 if there is nothing to show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="output folder of jobs/caption.py")
    parser.add_argument("--captions", type=int, default=8, metavar="N", help="captions to show (default 8)")
    options = parser.parse_args(arguments)
    try:
        rows = read_rows(options.output)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary = CaptionSummary(**json.loads((options.output / "summary.json").read_text()))

    captioned = [row for row in rows if row["status"] == "ok"]
    broken = [row for row in rows if row["status"] != "ok"]
    right = sum(map(is_right, captioned))

    console = Console()
    console.print(captions_table(pick(captioned, max(1, options.captions))))
    if broken:
        console.print(broken_table(broken))
    share = f"{right / len(captioned):.1%}" if captioned else "none"
    console.print(f"Exactly right: {right} of {len(captioned)} captions ({share})")
    console.print(as_table(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
