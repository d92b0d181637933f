"""`make train`, as a reader of the README would run it, with the environment that the tests have."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.cluster.commands import ROOT, started


@pytest.mark.slow
def test_make_train_teaches_another_manner(tmp_path: Path) -> None:
    folder = Path(sys.executable).parent
    command = ["make", "-C", str(ROOT), "-o", "venv", f"BIN={folder}", f"TRAIN_OUTPUT={tmp_path}/train", "train"]
    with started(command, COLUMNS="160") as run:
        assert run.wait(900) == 0, run.stderr
        shown = run.stdout
        run.wait_for_no_process()
    output = tmp_path / "train" / "run"
    before, after = (json.loads(line) for line in (output / "eval.jsonl").read_text().splitlines())
    assert (before["step"], before["rows"], before["skipped"]) == (0, 39, 0)
    assert after["loss"] < 0.2 < 5 < before["loss"]
    captions = [json.loads(line) for line in (output / "captions.jsonl").read_text().splitlines()]
    said = {step: [line["caption"] for line in captions if line["step"] == step] for step in (0, after["step"])}
    assert len(said[0]) == 8
    assert not any(text.startswith("I can see") for text in said[0])
    assert all(text.startswith("I can see ") and text.endswith(".") for text in said[after["step"]])

    assert "before, step 0: evaluation loss" in shown
    right = re.search(r"after, step \d+: evaluation loss 0\.\d+ over 39 rows; (\d+) of 8 captions exactly right", shown)
    assert right is not None, shown
    assert int(right[1]) >= 6
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "final" / "config.json").exists()
    ids = [set(pq.read_table(tmp_path / "train" / f"{name}.parquet")["id"].to_pylist()) for name in ("train", "eval")]
    assert not ids[0] & ids[1], "nothing is evaluated that was trained on"
    assert [len(part) for part in ids] == [267, 39]
