"""How far a captioning job is: the captioner reports totals, this turns them into rates and an estimate to display.

It knows neither Ray nor the ledger.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

from ray_ministral.driver.display import Display, duration

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
        self._display = Display("rows", total_rows, done_rows, stream, interval_s=interval_s, clock=clock)
        self._clock = clock
        self._started = clock()
        self._counts = Counts()
        self._window = RateWindow()

    def __enter__(self) -> Self:
        self._started = self._clock()
        resumed = f", {self._done_rows} of them done before" if self._done_rows else ""
        self._display.open(f"{self._total_rows} rows{resumed}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = self._clock() - self._started
        word = "done" if kind is None else "stopped"
        figures = self._figures(self._window.overall(), time_left=False)
        self._display.close(f"{word} after {seconds:.1f} s: {self._display.count(self._done)}, {figures}")

    def message(self, text: str) -> None:
        """See `Display.message`."""
        self._display.message(text)

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
        self._display.show(self._done, lambda: self._figures(self._window.recent(), time_left=True))

    @property
    def _done(self) -> int:
        return self._done_rows + self._counts.rows

    def _figures(self, rates: Rates, *, time_left: bool) -> str:
        figures = f"{self._counts.errors} errors, {rates.images:.1f} images/s, {rates.tokens:.0f} tokens/s"
        left = self._total_rows - self._done
        if time_left and rates.rows > 0 and left > 0:
            figures += f", {duration(left / rates.rows)} left"
        return figures
