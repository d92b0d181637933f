"""A timeline of a run for ui.perfetto.dev or chrome://tracing, in the JSON of Chrome's trace events.

Each event is a line, written as it comes: readers take a list that nobody closed, so a run that was killed has its
timeline, too. A replica is a process there, a stage a thread; the driver has a process of its own, with what it does on
one track and what runs beside it, and may overlap, on others. Clocks are those of the machines: on several nodes as far
apart as these are.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ray_ministral.captioning.step_times import StepSpan
from ray_ministral.errors import ConfigError
from ray_ministral.training.plan import StageReport

logger = logging.getLogger(__name__)

DRIVER = 0
"""Process number of the driver; replica r is r + 1."""


class Trace:
    """Writes a timeline to `file`, or nothing where that is None. Raises `ConfigError` where it cannot be made.

    Once it is made it never ends a run: when the disk is full, the timeline ends there.
    """

    def __init__(self, file: str | None) -> None:
        self._file: Any = None
        self._named: set[tuple[int, int]] = set()
        self._beside = 0
        # One offset for all that the driver does, so that spans within spans stay within.
        self._epoch = time.time() - time.perf_counter()
        self._separator = "[\n"
        if file is not None:
            path = Path(file)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("w", encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--trace {file} cannot be written: {error.strerror}: name another file") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._write("\n]\n" if self._named else "[]\n")
            self._close()

    @property
    def is_on(self) -> bool:
        """Whether anything is written."""
        return self._file is not None

    @contextmanager
    def driver(self, name: str, **values: Any) -> Iterator[None]:
        """What the driver does within."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._event(DRIVER, 0, name, self._epoch + begun, time.perf_counter() - begun, values)

    def beside(self, name: str, started: float, seconds: float, **values: Any) -> None:
        """What a task did; tasks of one name may overlap. `started` is in seconds since the epoch."""
        if self._file is None:
            return
        self._name_once(DRIVER, 0)
        self._beside += 1
        event = {"name": name, "cat": name, "id": self._beside, "pid": DRIVER, "tid": 0}
        self._line(event | {"ph": "b", "ts": started * 1e6, "args": values})
        self._line(event | {"ph": "e", "ts": (started + seconds) * 1e6})

    def step(self, replica: int, stage: int, span: StepSpan) -> None:
        """A step of captioning on a stage, and the model's part of it."""
        values = {
            "step": span.step,
            "microbatch": span.microbatch,
            "prefill_tokens": span.prefill_tokens,
            "decode_tokens": span.decode_tokens,
            "images": span.images,
        }
        self._event(replica + 1, stage, f"step {span.microbatch}", span.started, span.seconds, values)
        model_started = span.started + span.before_seconds
        self._event(replica + 1, stage, "model", model_started, span.model_seconds, {"step": span.step})

    def compute(self, replica: int, stage: int, step: int, report: StageReport) -> None:
        """What a stage did in phase one of a step of training."""
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

    def flush(self) -> None:
        """What was written so far survives the driver."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def _event(
        self, process: int, thread: int, name: str, started: float, seconds: float, values: dict[str, Any]
    ) -> None:
        if self._file is None:
            return
        self._name_once(process, thread)
        event = {"name": name, "ph": "X", "pid": process, "tid": thread, "ts": started * 1e6, "dur": seconds * 1e6}
        self._line(event | {"args": values})

    def _name_once(self, process: int, thread: int) -> None:
        if (process, thread) in self._named:
            return
        self._named.add((process, thread))
        names = ("driver", "driver") if process == DRIVER else (f"replica {process - 1}", f"stage {thread}")
        for kind, name in zip(("process_name", "thread_name"), names, strict=True):
            self._line({"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}})

    def _line(self, event: dict[str, Any]) -> None:
        self._write(self._separator + json.dumps(event))
        self._separator = ",\n"

    def _write(self, text: str) -> None:
        if self._file is not None:
            try:
                self._file.write(text)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.warning("the timeline %s ends here: %s", self._file.name, error)
        self._close()

    def _close(self) -> None:
        """Never raises; closing writes what is left in the buffer, if it can."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
