"""The progress display: rates, plain lines, the live bar on a (pseudo) terminal, and terminals that misbehave."""

from __future__ import annotations

import io
import json
import os
import threading

import pytest

from ray_ministral.driver.progress import Counts, Progress, Rates, RateWindow, rates_between
from ray_ministral.driver.summary import CaptionSummary, as_table


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_per_second_and_never_divide_by_zero() -> None:
    then = (10.0, Counts(rows=1, errors=0, images=2, tokens=30))
    assert rates_between(then, (12.0, Counts(5, 1, 8, 50))) == Rates(rows=2.0, images=3.0, tokens=10.0)
    assert rates_between(then, (10.0, Counts(5, 1, 8, 50))) == Rates()
    assert rates_between(then, (9.0, Counts(5, 1, 8, 50))) == Rates()
    assert RateWindow().recent() == RateWindow().overall() == Rates()


def test_the_recent_rate_forgets_and_the_overall_one_does_not() -> None:
    window = RateWindow(seconds=60)
    for second in range(101):
        window.add(float(second), Counts(rows=10 * second))
    for second in range(101, 201):
        window.add(float(second), Counts(rows=1000 + 2 * (second - 100)))
    assert window.recent().rows == pytest.approx(2.0)
    assert window.overall().rows == pytest.approx(6.0)


def test_the_window_holds_little_however_often_it_is_told() -> None:
    window = RateWindow(seconds=10, spacing=1)
    for step in range(100_000):
        window.add(step / 100, Counts(rows=step))
    assert len(window._samples) <= 12
    assert window.recent().rows == pytest.approx(100.0)


def test_plain_lines_come_at_the_start_every_interval_and_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(100, done_rows=20, stream=stream, clock=clock) as progress:
        progress.message("waiting for 2 stages: loading")
        progress.message("waiting for 2 stages: loading")
        clock.now += 30  # start-up is not held against the speed
        progress.update()
        for _ in range(20):
            clock.now += 1
            rows = int(clock.now - 1030)
            progress.update(rows=rows, errors=rows // 10, images=2 * rows, tokens=30 * rows)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "100 rows, 20 of them done before"
    assert lines[1] == "waiting for 2 stages: loading"
    assert lines[2] == "20/100 rows, 0 errors, 0.0 images/s, 0 tokens/s"
    assert lines[3] == "25/100 rows, 0 errors, 2.0 images/s, 30 tokens/s, 0:01:15 left"
    assert lines[-1] == "done after 50.0 s: 40/100 rows, 2 errors, 2.0 images/s, 30 tokens/s"
    # One at once and one each 5 of the 20 seconds.
    assert len([line for line in lines if " rows, " in line and "/100" in line and "done" not in line]) == 5


def test_the_same_message_is_said_again_after_the_interval() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(1, stream=stream, clock=clock) as progress:
        for _ in range(11):
            progress.message("waiting")
            clock.now += 1
    assert stream.getvalue().count("waiting\n") == 3


def test_a_long_job_tells_days() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(10_000_000, stream=stream, clock=clock) as progress:
        progress.update()
        clock.now += 10
        progress.update(rows=100, images=100)
    assert "1 d 3:46:30 left" not in stream.getvalue()
    assert "11 d 13:46:30 left" in stream.getvalue()


def test_an_exception_passes_through_and_the_end_says_stopped() -> None:
    stream = io.StringIO()

    def job() -> None:
        with Progress(3, stream=stream) as progress:
            progress.update(rows=1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        job()
    assert stream.getvalue().splitlines()[-1].startswith("stopped after ")


def test_it_writes_to_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1) as progress:
        progress.update(rows=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "1/1 rows" in err


class BrokenStream(io.StringIO):
    """A terminal that has gone away."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


def closed_stream() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [BrokenStream(), closed_stream()])
def test_a_broken_stream_never_ends_the_job(stream: io.StringIO) -> None:
    with Progress(1, stream=stream) as progress:
        progress.message("waiting")
        progress.update(rows=1)


def test_an_ascii_stream_gets_ascii() -> None:
    raw = io.BytesIO()
    with Progress(1, stream=io.TextIOWrapper(raw, encoding="ascii", write_through=True)) as progress:
        progress.message("größer …")
        assert raw.getvalue().decode("ascii").endswith("gr??er ?\n")


class Terminal:
    """A pseudo terminal whose output is collected, as a user's screen would."""

    def __init__(self) -> None:
        self.parent, child = os.openpty()
        self.stream = os.fdopen(child, "w", encoding="utf-8")
        self.collected = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self.parent, 65536)
            except OSError:  # EIO: the other end was closed
                return
            if not piece:
                return
            self.collected += piece

    def close(self) -> str:
        self.stream.close()
        self._reader.join(timeout=10)
        os.close(self.parent)
        return self.collected.decode()


def test_a_terminal_gets_a_live_bar_with_messages_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    terminal = Terminal()
    with Progress(100, done_rows=20, stream=terminal.stream) as progress:
        progress.message("waiting for 2 stages: [loading]")
        progress.update(rows=30, errors=1, images=29, tokens=100)
        # Whoever prints during the job must not reach stdout, where the table will be.
        print("a stray line")
    screen = terminal.close()
    assert "\x1b[" in screen  # cursor movements: it is live
    assert "waiting for 2 stages: [loading]" in screen
    assert "50/100" in screen
    assert "1 errors" in screen
    assert "a stray line" in screen
    assert "done after" in screen


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    with Progress(2, stream=terminal.stream) as progress:
        progress.update(rows=2)
    screen = terminal.close()
    assert "\x1b[" not in screen
    assert "2/2 rows" in screen


def test_a_terminal_that_hangs_up_never_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    parent, child = os.openpty()
    stream = os.fdopen(child, "w")
    progress = Progress(3, stream=stream)
    progress.__enter__()
    os.close(parent)
    progress.update(rows=1)
    progress.message("waiting")
    progress.__exit__(None, None, None)
    # What is left in the stream's buffer cannot be written either.
    with pytest.raises(OSError, match="Input/output"):
        stream.close()


def summary(**changes: object) -> CaptionSummary:
    fields: dict[str, object] = {
        "rows": 3,
        "ok": 2,
        "errors": 1,
        "seconds": 9.0,
        "startup_seconds": 4.0,
        "images_per_second": 0.6,
        "generated_tokens_per_second": 12.0,
        "stages": 2,
        "replicas": 1,
        "stage_busy": [0.81, 0.9],
        "recoveries": 0,
        "output": "out",
        "status_counts": {"ok": 2, "too_large": 1},
        "startup": {"ray": 1.0, "stages": 3.0},
        "bubble": 0.145,
        "steps": 40,
        "tokens_per_step": 25.5,
        "model_seconds": [4.0, 4.25],
        "outside_seconds": [0.05, 0.25],
    }
    return CaptionSummary(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_summary_survives_json_and_has_what_others_rely_on() -> None:
    written = json.loads(json.dumps(summary().to_json(), allow_nan=False))
    promised = (
        "rows ok errors seconds startup_seconds images_per_second generated_tokens_per_second stages replicas "
        "stage_busy recoveries"
    )
    assert set(promised.split()) <= set(written)
    assert CaptionSummary(**written) == summary()


def test_a_summary_of_an_earlier_version_is_read() -> None:
    later = {"bubble", "steps", "tokens_per_step", "model_seconds", "outside_seconds"}
    old = CaptionSummary(**{name: value for name, value in summary().to_json().items() if name not in later})  # type: ignore[arg-type]
    assert (old.rows, old.stage_busy, old.steps) == (3, [0.81, 0.9], 0)


@pytest.mark.parametrize("wrong", [{"ok": 3}, {"rows": 2}, {"status_counts": {"ok": 2}}])
def test_a_summary_that_does_not_add_up_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="do not make"):
        summary(**wrong)


def test_the_table_shows_the_figures() -> None:
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=60).print(as_table(summary(output="s3://bucket/[a]/" + "x" * 80)))
    text = stream.getvalue()
    for part in ["3: 2 ok, 1 errors", "too_large 1", "0.60 images/s", "81%, 90%", "ray 1.0 s, stages 3.0 s"]:
        assert part in text
    for part in ["bubble", "14%", "40, of 25.5 tokens on average", "4.00 s, 4.25 s", "0.05 s, 0.25 s"]:
        assert part in text
    # A long path is folded, not cut, and a bracket is no markup.
    assert "s3://bucket/[a]/" in text
    assert text.count("x") == 80 + text.count("max")
