"""What a training job leaves for people: lines, events that TensorBoard reads, a picture."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ray_ministral.data.rows import RowFailure
from ray_ministral.driver.eval_captions import EvalCaption
from ray_ministral.driver.evaluation import EvalResult
from ray_ministral.driver.loss_plot import draw_losses, smooth
from ray_ministral.driver.train_events import EventWriter, masked_crc
from ray_ministral.driver.train_log import TrainLog
from ray_ministral.driver.train_result import StepResult
from ray_ministral.training.samples import SkippedRow
from tests.unit.test_progress import Terminal

SKIPPED = SkippedRow("a.parquet", 0, 3, RowFailure("bad_image", "no image", "decode"))


def step(number: int) -> StepResult:
    return StepResult(number, 1 / number, 2.0, 1e-3, 100, 0.5, 2, 0, (0.25, 0.5))


def caption(number: int) -> EvalCaption:
    return EvalCaption(number, "b.parquet", 0, 1, "größer", f"after {number}", (5, 2))


def run(output: Path, total: int, first: int, last: int) -> None:
    """Steps `first` + 1 to `last`, with an evaluation at every second step and at the beginning, if it is missing."""
    with TrainLog(output, total, first) as log:
        for number in range(first, last + 1):
            if number > first:
                log.step(step(number), [SKIPPED] if number % 2 else [])
            if number % 2 == 0 and number not in log.evaluated:
                log.evaluation(EvalResult(number, 3.0, 7, 2, 1), [SKIPPED], [caption(number)])
        log.draw()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in lines(path)]


def test_a_run_that_goes_on_takes_back_what_is_done_again(tmp_path: Path) -> None:
    run(tmp_path, 8, 0, 5)
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert steps_of(tmp_path / "eval.jsonl") == steps_of(tmp_path / "captions.jsonl") == [0, 2, 4]
    # The crash tore a line of metrics, and came between the captions of an evaluation and its loss.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    (tmp_path / "eval.jsonl").write_text("".join((tmp_path / "eval.jsonl").read_text().splitlines(True)[:2]))

    run(tmp_path, 8, 4, 8)
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert steps_of(tmp_path / "eval.jsonl") == steps_of(tmp_path / "captions.jsonl") == [0, 2, 4, 6, 8]
    # Rows to evaluate on are listed once, those of a step each time.
    assert steps_of(tmp_path / "skipped.jsonl") == [0, 1, 3, 5, 7]
    assert lines(tmp_path / "eval.jsonl")[0] == {"step": 0, "loss": 3.0, "tokens": 7, "rows": 2, "skipped": 1}
    assert lines(tmp_path / "captions.jsonl")[0] == {
        "step": 0,
        "file": "b.parquet",
        "row_group": 0,
        "row": 1,
        "expected": "größer",
        "caption": "after 0",
        "token_ids": [5, 2],
    }


def test_a_run_from_the_start_undoes_another(tmp_path: Path) -> None:
    run(tmp_path, 4, 0, 4)
    run(tmp_path, 4, 0, 1)
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
    assert steps_of(tmp_path / "eval.jsonl") == steps_of(tmp_path / "captions.jsonl") == [0]
    assert steps_of(tmp_path / "skipped.jsonl") == [0, 1]


def test_lines_on_a_plain_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, 4, 0, 2)
    err = capsys.readouterr().err.splitlines()
    assert err[:3] == [
        "step 0: evaluation loss 3.0000 over 2 rows, 1 rows skipped",
        "step 0: 'after 0', expected 'größer'",
        "1/4 steps, loss 1.0000, norm 2.000, rate 1.00e-03, 200 tokens/s, bubble 25%, 0:00:02 left",
    ]
    assert err[-1].startswith("done after ")
    assert err[-1].endswith(
        " s: 2/4 steps, loss 0.5000, norm 2.000, rate 1.00e-03, 200 tokens/s, bubble 25%, 0:00:01 left"
    )


def test_a_terminal_gets_a_bar_with_captions_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal.stream)
    run(tmp_path, 4, 0, 3)
    screen = terminal.close()
    assert "\x1b[" in screen  # cursor movements: it is live
    assert "3/4" in screen
    assert "loss 0.3333, norm 2.000" in screen
    assert "expected 'größer'" in screen


# --- events ----------------------------------------------------------------------------------------------------------


def read_events(path: Path) -> list[Any]:
    """As TensorBoard reads them, with the protobuf classes and the checksum of tensorboardX."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        record = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
        assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked_crc32c(record),)
        events.append(Event.FromString(record))
        data = data[16 + length :]
    return events


def test_events_are_what_tensorboard_reads(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "events", 301)
    writer.scalars(301, {"train/loss": 0.5, "größer": -1.25})
    writer.scalars(70_000, {"train/loss": 0.25})
    writer.close()
    (path,) = (tmp_path / "events").glob("events.out.tfevents.*")
    version, start, first, second = read_events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (301, start.session_log.START)
    assert [(value.tag, value.simple_value) for value in first.summary.value] == [
        ("train/loss", 0.5),
        ("größer", -1.25),
    ]
    assert (first.step, second.step) == (301, 70_000)
    assert start.wall_time > 1.6e9


def test_the_checksum_of_rfc_3720() -> None:
    crc = 0xE3069283  # of "123456789", the usual check value of CRC-32C
    assert masked_crc(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_a_resumed_run_has_no_point_twice(tmp_path: Path) -> None:
    run(tmp_path, 8, 0, 5)
    run(tmp_path, 8, 4, 8)
    points: dict[str, dict[int, float]] = {}
    # TensorBoard's rule: what begins at a step discards what earlier files have from there on.
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        for event in read_events(path):
            if event.session_log.status == event.session_log.START:
                for of_tag in points.values():
                    for later in [number for number in of_tag if number >= event.step]:
                        del of_tag[later]
            for value in event.summary.value:
                assert event.step not in points.setdefault(value.tag, {}), (value.tag, event.step)
                points[value.tag][event.step] = value.simple_value
    assert set(points) == {
        "eval/loss",
        *(f"train/{name}" for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "bubble")),
    }
    assert sorted(points["train/loss"]) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sorted(points["eval/loss"]) == [0, 2, 4, 6, 8]
    assert points["train/bubble"][8] == 0.25
    assert points["train/tokens_per_second"][8] == 200


# --- the picture -----------------------------------------------------------------------------------------------------


def test_smoothing_is_a_mean_that_lags_on_neither_side() -> None:
    assert smooth([5.0], 3) == [5.0]
    assert smooth([1.0, 2.0, 6.0, 4.0, 5.0], 1) == pytest.approx([1.0, 3.0, 4.0, 5.0, 5.0])
    assert smooth([float(n) for n in range(50)], 10) == pytest.approx([float(n) for n in range(50)])


def test_the_picture_shows_both_curves_and_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    colours = []
    for steps, evaluations in (([], []), ([(1, 3.0), (2, 2.0)], []), ([(1, 3.0), (2, 2.0)], [(0, 4.0), (2, 2.5)])):
        draw_losses(path, steps, evaluations)
        with Image.open(path) as image:
            assert image.size == (960, 540)
            colours.append({pixel for _, pixel in image.convert("RGB").getcolors(1 << 20) or []})
    blue, orange = (31, 119, 180), (255, 127, 14)
    assert [(blue in shown, orange in shown) for shown in colours] == [(False, False), (True, False), (True, True)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]


def test_steps_that_are_done_again_after_a_loss_are_written_once(tmp_path: Path) -> None:
    with TrainLog(tmp_path, 4, 0) as log:
        for number in (1, 2, 3):
            log.step(step(number), [SKIPPED])
        log.evaluation(EvalResult(3, 0.5, 10, 2, 0), [], [caption(3)])
        log.rewind(1)
        assert log.evaluated == set()
        for number in (2, 3, 4):
            log.step(step(number), [SKIPPED])
        log.rewind(4)
    for name, steps in (("metrics", [1, 2, 3, 4]), ("skipped", [1, 2, 3, 4]), ("eval", []), ("captions", [])):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == steps, name
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2, "the second one says from where on it counts"
