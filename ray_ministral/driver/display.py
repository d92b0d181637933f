"""Where a job is shown: a live bar on a terminal, a plain line every few seconds elsewhere, messages above either.

What the bar counts and the figures beside it are the caller's. Whatever the terminal does, it never ends a job.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

INTERVAL_S = 5.0


class _SafeStream:
    """A text stream that can fail in silence: a closed terminal, a full disk or an ASCII locale must not end a job."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            return self.write(text.encode("ascii", "replace").decode("ascii"))
        except (OSError, ValueError):  # ValueError: the stream is closed
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"


class Display:
    """A bar of `total` units (rows, steps), of which `done` are done when it opens.

    Args:
        unit: what is counted, for plain lines.
        stream: where to write; stderr by default.
        interval_s: seconds between plain lines where there is no terminal.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        unit: str,
        total: int,
        done: int = 0,
        stream: TextIO | None = None,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._unit, self._total, self._done = unit, total, done
        self._stream = _SafeStream(sys.stderr if stream is None else stream)
        self._interval_s = interval_s
        self._clock = clock
        self._said: tuple[float, str] | None = None
        self._bar: tuple[RichProgress, TaskID] | None = None
        self._next_line = 0.0

    def open(self, greeting: str | None = None) -> None:
        """Start the bar; without a terminal say `greeting`, and the first line of figures an interval later."""
        self._bar = self._open_bar()
        if self._bar is None and greeting is not None:
            self._line(greeting)
            self._next_line = self._clock() + self._interval_s

    def close(self, farewell: str) -> None:
        """Take the bar away and say the last line."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None
        self._line(farewell)

    def message(self, text: str) -> None:
        """Say something, such as what is being waited for. The same text again is not repeated within the interval."""
        now = self._clock()
        if self._said is not None and self._said[1] == text and now - self._said[0] < self._interval_s:
            return
        self._said = (now, text)
        if self._bar is None:
            self._line(text)
        else:
            self._bar[0].console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, done: int, figures: Callable[[], str]) -> None:
        """So many units are done; `figures` are asked for when they are shown."""
        now = self._clock()
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=done, figures=figures())
        elif now >= self._next_line:
            self._line(f"{self.count(done)}, {figures()}")
            self._next_line = now + self._interval_s

    def count(self, done: int) -> str:
        """How many of how many."""
        return f"{done}/{self._total} {self._unit}"

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _open_bar(self) -> tuple[RichProgress, TaskID] | None:
        if not self._stream.isatty():
            return None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        # `_SafeStream` has all of a file that rich asks for. What else writes to stdout or stderr meanwhile (logs,
        # Ray's workers) is led above the bar, and stays on stderr.
        console = Console(file=self._stream, force_terminal=True)  # type: ignore[arg-type]
        if console.is_dumb_terminal:
            return None
        bar = RichProgress(
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=4,
        )
        task = bar.add_task(self._unit, total=self._total, completed=self._done, figures="starting")
        bar.start()
        return bar, task


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, in front of them days when there are any."""
    days, rest = divmod(round(seconds), 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    clock = f"{hours}:{minutes:02}:{rest:02}"
    return f"{days} d {clock}" if days else clock
