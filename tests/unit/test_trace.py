"""The timeline of a run, as Perfetto reads it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ray_ministral.captioning.step_times import StepSpan
from ray_ministral.driver.trace import Trace
from ray_ministral.errors import ConfigError
from ray_ministral.pipeline.schedule import Action, Kind
from ray_ministral.pipeline.simulator import Span
from ray_ministral.training.plan import StageReport

REPORT = StageReport(
    losses=(1.0,),
    squared_norms={},
    started=1000.0,
    seconds=4.0,
    spans=(Span(Action(Kind.RECV_F, 0, 1), 0.5, 1.0), Span(Action(Kind.F, 0, 1), 1.0, 2.5)),
    peak_rss_bytes=7,
)


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


STEP = StepSpan(
    step=7,
    microbatch=2,
    started=1000.0,
    seconds=0.75,
    before_seconds=0.25,
    model_seconds=0.375,
    prefill_tokens=40,
    decode_tokens=3,
    images=2,
)


def test_events_lie_where_they_happened(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trace.json"
    with Trace(str(path)) as trace:
        with trace.driver("samples", step=1):
            pass
        trace.compute(0, 1, 1, REPORT)
        trace.commit(0, 1, 1, 1005.0, 0.25)
    found = events(path)
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in found if event["name"] == "thread_name"}
    assert names == {(0, 0): "driver", (1, 1): "stage 1"}
    timed = {event["name"]: event for event in found if event["ph"] == "X"}
    assert set(timed) == {"samples", "RECV_F 0", "F 0", "sums and norms", "optimizer"}
    forward = timed["F 0"]
    assert (forward["ts"], forward["dur"]) == (1001.0 * 1e6, 1.5 * 1e6)
    assert forward["args"] == {"step": 1, "microbatch": 0, "chunk": 1}
    assert timed["sums and norms"]["ts"] == 1002.5 * 1e6
    assert timed["sums and norms"]["args"]["peak_rss_bytes"] == 7


def test_a_step_of_captioning_has_the_model_within_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Trace(str(path)) as trace:
        trace.step(1, 0, STEP)
    found = events(path)
    assert [event["args"]["name"] for event in found if event["ph"] == "M"] == ["replica 1", "stage 0"]
    step, model = (event for event in found if event["ph"] == "X")
    assert (step["name"], step["pid"], step["tid"]) == ("step 2", 2, 0)
    assert (step["ts"], step["dur"]) == (1000.0 * 1e6, 0.75 * 1e6)
    assert step["args"] == {"step": 7, "microbatch": 2, "prefill_tokens": 40, "decode_tokens": 3, "images": 2}
    assert (model["name"], model["pid"], model["tid"]) == ("model", 2, 0)
    assert (model["ts"], model["dur"]) == (1000.25 * 1e6, 0.375 * 1e6)


def test_what_runs_beside_the_driver_may_overlap(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Trace(str(path)) as trace:
        trace.beside("write", 1000.0, 2.0, part="a")
        trace.beside("write", 1001.0, 2.0, part="b")
    begins = [event for event in events(path) if event["ph"] == "b"]
    ends = {event["id"]: event["ts"] for event in events(path) if event["ph"] == "e"}
    assert [(event["args"]["part"], event["ts"], ends[event["id"]]) for event in begins] == [
        ("a", 1000.0 * 1e6, 1002.0 * 1e6),
        ("b", 1001.0 * 1e6, 1003.0 * 1e6),
    ]


def test_what_the_driver_does_within_lies_within(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    def fail() -> None:
        with Trace(str(path)) as trace, trace.driver("complete"):
            with trace.driver("file", part="a"):
                pass
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    inner, outer = (event for event in events(path) if event["ph"] == "X")
    assert (inner["name"], outer["name"]) == ("file", "complete"), "what failed is there, too"
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def test_an_empty_timeline_is_json(tmp_path: Path) -> None:
    with Trace(str(tmp_path / "trace.json")):
        pass
    assert events(tmp_path / "trace.json") == []


def test_a_run_that_was_killed_has_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Trace(str(path)) as trace:
        trace.step(0, 0, STEP)
        trace.flush()
        assert len(json.loads(path.read_text() + "]")) == 4, "two names, the step, the model"


def test_a_file_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--trace .* cannot be written: Is a directory"):
        Trace(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="name another file"):
        Trace(str(tmp_path / "file" / "trace.json"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is a thing of Linux")
def test_a_full_disk_ends_the_timeline_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with Trace("/dev/full") as trace, caplog.at_level(logging.WARNING, logger="ray_ministral"):
        trace.step(0, 0, STEP)
        assert trace.is_on
        trace.flush()
        assert not trace.is_on
        trace.step(0, 0, STEP)
        with trace.driver("launch"):
            pass
    assert caplog.text.count("ends here") == 1
    assert "No space left" in caplog.text


def test_busy_is_all_but_waiting() -> None:
    assert REPORT.busy_seconds == 3.5


def test_no_file_where_none_is_wanted(tmp_path: Path) -> None:
    with Trace(None) as trace, trace.driver("samples"):
        trace.compute(0, 0, 1, REPORT)
        trace.step(0, 0, STEP)
        trace.beside("write", 1000.0, 2.0)
        trace.flush()
        assert not trace.is_on
    assert not list(tmp_path.iterdir())
