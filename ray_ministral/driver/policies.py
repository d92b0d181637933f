"""What to do about what has happened: pure functions, no Ray, no clock. The driver acts on what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

PATIENCE = 4
"""While each death at least narrows down which row is to blame, so many times `max_restarts` are allowed: halving the
rows of three full microbatches takes nine deaths."""

EVIDENCE_ROWS = 500
EVIDENCE_SIGMAS = 4.0


@dataclass(frozen=True)
class Death:
    """Of a stage: `rows` that its replica has finished since the death before, `narrowed` as in `suspects.Verdict`."""

    cause: str
    rows: int
    narrowed: bool = False


class Decision(Enum):
    """What to do about a death."""

    REPLACE = "replace"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class FailurePolicy:
    """At most `max_restarts` deaths of a replica's stages one after the other that bring the job nothing."""

    max_restarts: int

    def decide(self, deaths: Sequence[Death]) -> Decision:
        """After the `deaths` of one replica so far, the last one included."""
        in_vain = _last_ones(deaths, lambda death: death.rows == 0 and not death.narrowed)
        without_rows = _last_ones(deaths, lambda death: death.rows == 0)
        if in_vain > self.max_restarts or without_rows > PATIENCE * self.max_restarts:
            return Decision.GIVE_UP
        return Decision.REPLACE


def too_many_errors(errors: int, done: int, rows: int, max_rate: float) -> bool:
    """Whether a job of `rows` rows, of which `done` are done, has or will have more than `max_rate` bad ones.

    It has, when there are more errors already than it may have at the end. It will, when after enough rows the share is
    so far above `max_rate` that chance does not explain it (Wilson's interval at four sigmas).
    """
    if errors > max_rate * rows:
        return True
    if done < EVIDENCE_ROWS or done >= rows:
        return False
    share, spread = errors / done, EVIDENCE_SIGMAS**2 / done
    margin = EVIDENCE_SIGMAS * math.sqrt(share * (1 - share) / done + spread / (4 * done))
    return (share + spread / 2 - margin) / (1 + spread) > max_rate


def threads_for(stages: int, cpus: Sequence[float]) -> int:
    """The most threads that each of so many stages can have where nodes have so many CPUs. At least one.

    A stage lies on one node: two stages on three nodes of two CPUs get two threads each, not three.
    """
    for threads in range(int(max(cpus, default=0)), 1, -1):
        if sum(int(of_node) // threads for of_node in cpus) >= stages:
            return threads
    return 1


def keep_waiting(waited_s: float, since_nodes_were_coming_s: float, timeout_s: float, nodes_timeout_s: float) -> bool:
    """Whether to go on waiting for room.

    For `timeout_s` without a node on its way; as long as nodes are on their way, for `nodes_timeout_s` in all.
    """
    return since_nodes_were_coming_s <= timeout_s and waited_s <= max(timeout_s, nodes_timeout_s)


def _last_ones(deaths: Sequence[Death], holds: Callable[[Death], bool]) -> int:
    count = 0
    for death in reversed(deaths):
        if not holds(death):
            break
        count += 1
    return count
