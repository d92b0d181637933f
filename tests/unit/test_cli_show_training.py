"""examples/show_training.py: what `make train` prints at its end."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.unit.example_scripts import script


@pytest.fixture(scope="module")
def show() -> ModuleType:
    return script("show_training")


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_first_and_the_last_evaluation_side_by_side(
    show: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    write(tmp_path / "eval.jsonl", [{"step": step, "loss": 4.0 - step / 2, "rows": 9} for step in (0, 2, 4)])
    captions = [
        {"step": step, "row": row, "expected": f"[{row}]", "caption": f"[{row}]" if step == 4 and row else f"at {step}"}
        for step in (0, 2, 4)
        for row in range(3)
    ]
    write(tmp_path / "captions.jsonl", captions)
    assert show.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "before, step 0: evaluation loss 4.000 over 9 rows; 0 of 3 captions exactly right" in text
    assert "after, step 4: evaluation loss 2.000 over 9 rows; 2 of 3 captions exactly right" in text
    assert text.count("at 0") == 3
    assert text.count("at 4") == 1
    assert "at 2" not in text
    assert text.count("[2]") == 2, "a bracket is no markup"


def test_it_says_what_to_do_where_there_is_nothing(
    show: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show.main([str(tmp_path)]) == 1
    assert "make train" in capsys.readouterr().err
