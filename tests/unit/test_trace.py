"""The timeline of a run, as Perfetto reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray_ministral.driver.trace import Trace
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
    text = path.read_text().rstrip()
    assert text.startswith("[\n")
    found: list[dict[str, Any]] = json.loads(text.rstrip(",") + "]")
    return found


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


def test_busy_is_all_but_waiting() -> None:
    assert REPORT.busy_seconds == 3.5


def test_no_file_where_none_is_wanted(tmp_path: Path) -> None:
    with Trace(None) as trace, trace.driver("samples"):
        trace.compute(0, 0, 1, REPORT)
    assert not list(tmp_path.iterdir())
