"""A timeline of a run for ui.perfetto.dev or chrome://tracing, in the JSON of Chrome's trace events.

Each event is a line, written as it comes: readers take a list that nobody closed, so a run that was killed has its
timeline, too. A replica is a process there, a stage a thread; the driver has a process of its own. Clocks are those of
the machines: on several nodes as far apart as these are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ray_ministral.training.plan import StageReport

DRIVER = 0
"""Process number of the driver; replica r is r + 1."""


class Trace:
    """Writes a timeline to `file`, or nothing where that is None."""

    def __init__(self, file: str | None) -> None:
        self._file: Any = None
        self._named: set[tuple[int, int]] = set()
        if file is not None:
            path = Path(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
            self._file.write("[\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    @contextmanager
    def driver(self, name: str, **values: Any) -> Iterator[None]:
        """What the driver does within."""
        started, begun = time.time(), time.perf_counter()
        yield
        self._event(DRIVER, 0, name, started, time.perf_counter() - begun, values)

    def compute(self, replica: int, stage: int, step: int, report: StageReport) -> None:
        """What a stage did in phase one of a step."""
        if self._file is None:
            return
        for span in report.spans:
            action = span.action
            values = {"step": step, "microbatch": action.microbatch, "chunk": action.chunk}
            name = f"{action.kind.value} {action.microbatch}"
            self._event(replica + 1, stage, name, report.started + span.start, span.end - span.start, values)
        last = report.spans[-1].end if report.spans else 0.0
        values = {"step": step, "peak_rss_bytes": report.peak_rss_bytes}
        self._event(replica + 1, stage, "sums and norms", report.started + last, report.seconds - last, values)

    def commit(self, replica: int, stage: int, step: int, started: float, seconds: float) -> None:
        """A stage's optimizer step."""
        self._event(replica + 1, stage, "optimizer", started, seconds, {"step": step})

    def _event(
        self, process: int, thread: int, name: str, started: float, seconds: float, values: dict[str, Any]
    ) -> None:
        if self._file is None:
            return
        if (process, thread) not in self._named:
            self._named.add((process, thread))
            self._name(process, thread)
        event = {"name": name, "ph": "X", "pid": process, "tid": thread, "ts": started * 1e6, "dur": seconds * 1e6}
        self._file.write(json.dumps(event | {"args": values}) + ",\n")

    def _name(self, process: int, thread: int) -> None:
        names = ("driver", "driver") if process == DRIVER else (f"replica {process - 1}", f"stage {thread}")
        for kind, name in zip(("process_name", "thread_name"), names, strict=True):
            event = {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
            self._file.write(json.dumps(event) + ",\n")
