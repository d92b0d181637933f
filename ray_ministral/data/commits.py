"""`Commits`: commits attempts one after another in a thread beside the driver's loop, which no slow disk holds up."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType

from ray_ministral.data.ledger import Ledger
from ray_ministral.data.parts import Attempt, PartInfo

logger = logging.getLogger(__name__)

LEAVE_S = 30.0
"""Longest wait, when a job ends early, for what can still be committed."""


@dataclass(frozen=True)
class Committed:
    """A part that is committed: the index of its shard, what its entry says, and how long the commit took.

    started, seconds: since the epoch, when the thread began with it, and its duration.
    """

    shard_index: int
    info: PartInfo
    started: float
    seconds: float


class Commits:
    """Attempts on their way into a ledger; a context manager that waits at most `LEAVE_S` for the last of them.

    The thread is a daemon, not one of an executor, for which the interpreter would wait on its way out: a disk that
    hangs must not keep the process.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: deque[tuple[int, Attempt, int]] = deque()
        self._under_way: list[str] = []
        self._done: deque[Committed] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="commits", daemon=True)
        self._thread.start()

    def submit(self, shard_index: int, attempt: Attempt, *, generation: int) -> None:
        """Let an attempt be committed; `generation` is that of the pipelines."""
        with self._changed:
            self._waiting.append((shard_index, attempt, generation))
            self._under_way.append(attempt.info.name)
            self._changed.notify_all()

    @property
    def under_way(self) -> list[str]:
        """The names of parts that were submitted and are not committed yet."""
        with self._changed:
            return list(self._under_way)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way, and `done` has nothing more to say."""
        with self._changed:
            return not self._under_way and not self._done

    def done(self) -> list[Committed]:
        """What has been committed since the last call. Does not wait.

        Raises what a commit raised (OutputError, LeaseLostError), after which nothing more is committed; LeaseLostError
        also where the heartbeat has seen that another job has taken over.
        """
        self._ledger.lease.raise_if_lost()
        with self._changed:
            if self._error is not None:
                raise self._error
            found = list(self._done)
            self._done.clear()
            return found

    def wait(self, timeout_s: float) -> bool:
        """Wait until `done` has something to say; whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._done) or self._error is not None, timeout_s)

    def close(self, timeout_s: float = LEAVE_S) -> None:
        """Wait for what was submitted, at most so long; nothing is begun after that. Does not raise."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            if self._closed:
                return
            self._changed.wait_for(lambda: not self._under_way or self._error is not None, timeout_s)
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
            left = list(self._under_way)
        if left:
            logger.warning("not committed, and done again by the same command: %s", ", ".join(left))
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Commits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                shard_index, attempt, generation = self._waiting.popleft()
            started, begun = time.time(), time.perf_counter()
            try:
                info = self._ledger.commit(attempt, generation=generation)
            except BaseException as error:  # noqa: BLE001  # it is raised again where somebody listens
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._under_way.remove(attempt.info.name)
                self._done.append(Committed(shard_index, info, started, time.perf_counter() - begun))
                self._changed.notify_all()
