"""`Clock`: where the time of a job goes. All in seconds since it was made."""

from __future__ import annotations

import time


class Clock:
    """Laps of the start-up, and the time from the first admission to the last commit."""

    def __init__(self) -> None:
        self._start = self._lap = time.monotonic()
        self._first: float | None = None
        self._last: float | None = None
        self.laps: dict[str, float] = {}

    def lap(self, name: str, **of_which: float) -> None:
        """The time since the last lap went to `name`, of which some to named parts."""
        now = time.monotonic()
        self.laps[name] = now - self._lap
        self._lap = now
        for part, seconds in of_which.items():
            self.laps[f"{name}: {part}"] = seconds

    def first_admission(self) -> None:
        """The first row has entered the pipeline."""
        if self._first is None:
            self._first = time.monotonic()
            self.lap("first rows")

    def last_commit(self) -> None:
        """A part was committed just now."""
        self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self._start

    @property
    def startup_seconds(self) -> float:
        """Until the first admission, or so far."""
        return self.seconds if self._first is None else self._first - self._start

    @property
    def working_seconds(self) -> float:
        """From the first admission to the last commit."""
        return 0.0 if self._first is None or self._last is None else self._last - self._first
