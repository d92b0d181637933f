"""How far the job is: a live bar on a terminal, a plain line every few seconds elsewhere.

The captioner reports totals; this module turns them into rates and an estimate and writes to stderr. It knows neither
Ray nor the ledger, and whatever the terminal does, it never ends the job.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

RATE_WINDOW_S = 300.0


@dataclass(frozen=True)
class Counts:
    """Totals of this run so far; rows of earlier runs are not in them."""

    rows: int = 0
    errors: int = 0
    images: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Rates:
    """Per second; 0 while nothing is known."""

    rows: float = 0.0
    images: float = 0.0
    tokens: float = 0.0


def rates_between(then: tuple[float, Counts], now: tuple[float, Counts]) -> Rates:
    """The rates between two moments, given as (seconds, totals); 0 if no time went by between them."""
    seconds = now[0] - then[0]
    if seconds <= 0:
        return Rates()
    return Rates(
        rows=max(0, now[1].rows - then[1].rows) / seconds,
        images=max(0, now[1].images - then[1].images) / seconds,
        tokens=max(0, now[1].tokens - then[1].tokens) / seconds,
    )


class RateWindow:
    """Rates over the last few minutes: a pipeline that was rebuilt in between shows soon what it can do now.

    Time counts from the first totals that were added, so that start-up is not held against the speed.
    """

    def __init__(self, seconds: float = RATE_WINDOW_S, spacing: float = 1.0) -> None:
        self._seconds = seconds
        self._spacing = spacing
        self._first: tuple[float, Counts] | None = None
        self._samples: deque[tuple[float, Counts]] = deque()
        self._last: tuple[float, Counts] = (0.0, Counts())

    def add(self, now: float, counts: Counts) -> None:
        """Take note of the totals at the time `now`, in seconds of any monotonic clock."""
        self._last = (now, counts)
        if self._first is None:
            self._first = self._last
        if not self._samples or now - self._samples[-1][0] >= self._spacing:
            self._samples.append(self._last)
        # The oldest sample that is kept lies just outside the window, so that the window is covered.
        while len(self._samples) > 1 and now - self._samples[1][0] >= self._seconds:
            self._samples.popleft()

    def recent(self) -> Rates:
        """Rates over the window."""
        return rates_between(self._samples[0], self._last) if self._samples else Rates()

    def overall(self) -> Rates:
        """Rates since the first totals."""
        return rates_between(self._first, self._last) if self._first else Rates()


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


class Progress:
    """Shows how far the job is, as a context manager.

    Args:
        total_rows: input rows of the job.
        done_rows: of these, rows that earlier runs have committed; they count as done, not as speed.
        stream: where to write; stderr by default.
        interval_s: seconds between plain lines where there is no terminal.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        total_rows: int,
        done_rows: int = 0,
        stream: TextIO | None = None,
        *,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_rows = total_rows
        self._done_rows = done_rows
        self._stream = _SafeStream(sys.stderr if stream is None else stream)
        self._interval_s = interval_s
        self._clock = clock
        self._started = clock()
        self._counts = Counts()
        self._window = RateWindow()
        self._said: tuple[float, str] | None = None
        self._bar: tuple[RichProgress, TaskID] | None = None
        self._next_line = 0.0

    def __enter__(self) -> Self:
        self._started = self._clock()
        self._bar = self._open_bar()
        if self._bar is None:
            resumed = f", {self._done_rows} of them done before" if self._done_rows else ""
            self._line(f"{self._total_rows} rows{resumed}")
            self._next_line = self._started + self._interval_s
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None
        seconds = self._clock() - self._started
        word = "done" if kind is None else "stopped"
        self._line(f"{word} after {seconds:.1f} s: {self._describe(self._window.overall(), time_left=False)}")

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

    def update(self, *, rows: int = 0, errors: int = 0, images: int = 0, tokens: int = 0) -> None:
        """Report the totals of this run so far. The speed counts from the first call: make one at the first admission.

        Args:
            rows: rows finished, failed ones included.
            errors: of these, the failed ones.
            images: images captioned.
            tokens: tokens generated.
        """
        now = self._clock()
        self._counts = Counts(rows, errors, images, tokens)
        self._window.add(now, self._counts)
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=self._done, figures=self._figures(self._window.recent(), time_left=True))
        elif now >= self._next_line:
            self._line(self._describe(self._window.recent(), time_left=True))
            self._next_line = now + self._interval_s

    @property
    def _done(self) -> int:
        return self._done_rows + self._counts.rows

    def _describe(self, rates: Rates, *, time_left: bool) -> str:
        return f"{self._done}/{self._total_rows} rows, {self._figures(rates, time_left=time_left)}"

    def _figures(self, rates: Rates, *, time_left: bool) -> str:
        figures = f"{self._counts.errors} errors, {rates.images:.1f} images/s, {rates.tokens:.0f} tokens/s"
        left = self._total_rows - self._done
        if time_left and rates.rows > 0 and left > 0:
            figures += f", {_duration(left / rates.rows)} left"
        return figures

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
        task = bar.add_task("rows", total=self._total_rows, completed=self._done_rows, figures="starting")
        bar.start()
        return bar, task


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, in front of them days when there are any."""
    days, rest = divmod(round(seconds), 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    clock = f"{hours}:{minutes:02}:{rest:02}"
    return f"{days} d {clock}" if days else clock
