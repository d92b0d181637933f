"""The grids and the command that prints and compares schedules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ray_ministral.pipeline.generators import SCHEDULES, interleaved, one_f_one_b
from ray_ministral.pipeline.schedule_grid import render
from ray_ministral.pipeline.schedule_report import main
from ray_ministral.pipeline.simulator import Durations, simulate
from ray_ministral.pipeline.zero_bubble import zero_bubble

MODULE = "ray_ministral.pipeline.schedule"


def test_a_grid_of_cells() -> None:
    assert render(one_f_one_b(2, 3)).splitlines() == [
        "stage 0 |F0 F1 .  B0 F2 B1 .  B2|",
        "stage 1 |.  F0 B0 F1 B1 F2 B2 . |",
    ]
    assert render(zero_bubble(2, 1)).splitlines() == [
        "stage 0 |F0 .  .  B0 W0|",
        "stage 1 |.  F0 B0 W0 . |",
    ]
    # Where stages have several chunks a cell says which.
    assert render(interleaved(2, 1, 2)).splitlines() == [
        "stage 0 |F0.0 .    F0.2 .    .    B0.2 .    B0.0|",
        "stage 1 |.    F0.1 .    F0.3 B0.3 .    B0.1 .   |",
    ]


def test_a_grid_to_scale() -> None:
    times = Durations.uniform(2, forward=3, backward=6, weight=2)
    assert render(simulate(one_f_one_b(2, 2), times), width=27).splitlines() == [
        "stage 0 |F0>F1>......B0<<<<...B1<<<<|",
        "stage 1 |...F0>B0<<<<F1>B1<<<<......|",
        "         0                        27",
    ]
    # Too few columns: what does not fit is cut.
    assert render(simulate(one_f_one_b(1, 1), Durations.uniform(1)), width=3).splitlines()[0] == "stage 0 |FB0|"
    with pytest.raises(ValueError, match="at least 1 column"):
        render(simulate(one_f_one_b(2, 2), times), width=0)


def test_the_command_compares_all_schedules(root: Path) -> None:
    """As a user starts it, and without torch: `-X importtime` lists every module that is loaded."""
    sizes = ["--stages", "4", "--microbatches", "8", "--chunks-per-stage", "2"]
    costs = ["--forward", "1", "--backward", "2", "--weight", "1"]
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", MODULE, *sizes, *costs],
        cwd=root, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert "argparse" in loaded
    assert not loaded & {"torch", "numpy", "ray", "megatron", "transformers", "pyarrow"}
    for name in SCHEDULES:
        assert f"{name}: 4 stages, 8 microbatches" in result.stdout
    rows = [line.split() for line in result.stdout.split("\nschedule ")[1].splitlines()[1:]]
    assert rows == [
        ["gpipe", "33", "27.3%", "8", "8", "8", "8", "fine"],
        ["1f1b", "33", "27.3%", "4", "3", "2", "1", "stuck"],
        ["interleaved", "28.5", "15.8%", "5.5", "4.5", "3.5", "2.5", "stuck"],
        ["zero-bubble", "27", "11.1%", "4", "4", "4", "4", "stuck"],
    ]


def test_options_change_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    def step(*options: str) -> str:
        assert main(["--stages", "2", "--microbatches", "2", "--schedule", "1f1b", *options]) == 0
        return capsys.readouterr().out.splitlines()[-1].split()[1]

    assert step() == "9"
    assert step("--forward", "1", "3") == "13"
    assert step("--transfer", "1") == "11"
    assert step("--handling", "1") == "15"
    assert step("--microbatch-scale", "2", "2") == "18"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--stages", "0"], "--stages must be at least 1"),
        (["--microbatches", "0"], "microbatches must be at least 1"),
        (["--chunks-per-stage", "0"], "--chunks-per-stage must be at least 1"),
        (["--forward", "1", "2"], "--forward takes one number or one for each of 4 stages, got 2"),
        (["--weight", "3"], "give the backward with its weight part"),
        (["--microbatch-scale", "1"], "--microbatch-scale takes 8 numbers"),
        (["--schedule", "interleaved", "--chunks-per-stage", "1"], "use --chunks-per-stage 2"),
        (["--memory-limit", "0"], "at least 1"),
        (["--width", "0"], "at least 1 column"),
    ],
)
def test_wrong_options_end_with_2_and_a_reason(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_without_several_chunks_interleaved_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--stages", "2", "--microbatches", "2", "--chunks-per-stage", "1"]) == 0
    out = capsys.readouterr().out
    assert "interleaved" not in out
    assert "zero-bubble" in out
