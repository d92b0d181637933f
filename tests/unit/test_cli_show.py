"""examples/show.py: what the quick start prints at its end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_ministral.driver.summary import CaptionSummary
from tests.unit.example_scripts import script


@pytest.fixture(scope="module")
def show() -> ModuleType:
    return script("show")


def row(number: int, caption: str | None, expected: str | None, status: str = "ok", error: str | None = None) -> dict:
    return {"id": number, "caption": caption, "expected": expected, "status": status, "error": error}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    parts = {
        "part-00000-00000-00000000.parquet": [row(n, f"caption {n}", f"caption {n}") for n in range(18)],
        "part-00000-00001-00000000.parquet": [
            row(18, "two red squares", "three red squares"),
            row(19, "caption 19", "caption 19"),
            row(20, None, None, "bad_image", "not an image: [b'oops']"),
        ],
    }
    for name, rows in parts.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    summary = CaptionSummary(21, 20, 1, 9.5, 3.0, 3.25, 40.0, 2, 1, [0.5, 0.6], 0, str(tmp_path))
    (tmp_path / "summary.json").write_text(json.dumps(dataclasses.asdict(summary)))
    return tmp_path


def test_it_counts_what_is_exactly_right(
    show: ModuleType, output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert show.main([str(output), "--captions", "4"]) == 0
    text = capsys.readouterr().out
    assert "Exactly right: 19 of 20 captions (95.0%)" in text
    assert "bad_image" in text
    assert "not an image: [b'oops']" in text
    # The wrong one is shown, whether or not it is among the few.
    assert "two red squares" in text
    assert "three red squares" in text
    assert text.count("right") == 4 + 1  # four captions and the line that counts
    assert "3.25 images/s" in text


def test_it_says_what_to_do_where_there_is_nothing(
    show: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show.main([str(tmp_path)]) == 1
    assert "make caption" in capsys.readouterr().err
