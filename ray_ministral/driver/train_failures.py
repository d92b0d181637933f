"""`Failures`: what has gone wrong in a training run so far, and whether that is too much."""

from __future__ import annotations

import time

from ray_ministral.driver.policies import Death, Decision, FailurePolicy
from ray_ministral.errors import ClusterError, LeaseLostError, OutputError, PlacementError

FINAL = (PlacementError, OutputError, LeaseLostError)
"""What no other stage can mend."""


class Failures:
    """Of a run that may fail `max_restarts` times in a row without a step being done."""

    def __init__(self, max_restarts: int) -> None:
        self._policy = FailurePolicy(max_restarts)
        self._deaths: list[Death] = []
        self._steps_done = 0
        self._began = 0.0
        self.recoveries = 0
        self.seconds = 0.0
        self.steps_lost = 0

    def step_done(self) -> None:
        """A step has come to its end, so what went wrong before it was not in vain."""
        self._steps_done += 1
        self.over()

    def note(self, error: ClusterError) -> None:
        """Something has gone wrong. Raises it where nothing can be done about it, or it has happened too often."""
        if isinstance(error, FINAL):
            raise error
        self._deaths.append(Death(f"{error}", self._steps_done))
        self._steps_done = 0
        if self._policy.decide(self._deaths) is Decision.GIVE_UP:
            count = len(self._deaths)
            raise type(error)(
                f"{error}; given up after {count} failures, the last {self._policy.max_restarts + 1} of them without a "
                "step being done in between. Raise --max-restarts if they are not of one cause; the same command goes "
                "on from the last checkpoint"
            ) from error
        if not self._began:
            self._began = time.monotonic()
            self.recoveries += 1

    def lost(self, steps: int) -> None:
        """So many steps were begun and have to be done again."""
        self.steps_lost += steps

    def over(self) -> None:
        """A recovery lasts until the next step is done, or the run is."""
        if self._began:
            self.seconds += time.monotonic() - self._began
            self._began = 0.0
