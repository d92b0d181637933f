"""`HeadWatch`: ends this process when the head of its cluster has died: with a message and status 4, not with Ray's 1.

Nothing can be done without the head, and little can be done about it: Ray's calls to it block, in C++, and after a
minute Ray (2.60) ends the process itself, at once and with status 1, whatever it is doing. So this comes before that.
What is committed stays committed; the same command goes on with another cluster.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from types import TracebackType

from ray_ministral.errors import ClusterError

logger = logging.getLogger(__name__)

ASK_EVERY_S = 2.0
ANSWER_S = 5.0
PATIENCE_S = 40.0
"""A head may be away for so long (one that keeps its state elsewhere comes back). Ray's own patience is 60 s."""


class HeadWatch:
    """A thread that asks whether somebody listens at `address` (HOST:PORT), for as long as the context lasts."""

    def __init__(self, address: str, patience_s: float = PATIENCE_S) -> None:
        host, _, port = address.rpartition(":")
        self._place = host.strip("[]"), int(port)
        self._address, self._patience_s = address, patience_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="head-watch", daemon=True)

    def __enter__(self) -> HeadWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(ANSWER_S + 1)

    def _run(self) -> None:
        heard_at = time.monotonic()
        while not self._over.wait(ASK_EVERY_S):
            if self._answers():
                heard_at = time.monotonic()
            elif (silent := time.monotonic() - heard_at) > self._patience_s:
                logger.error(
                    "the head of the cluster, %s, has not answered for %.0f s: it is dead or cut off; the same command "
                    "goes on with another cluster",
                    self._address,
                    silent,
                )
                logging.shutdown()
                sys.stderr.flush()
                os._exit(ClusterError.exit_status)

    def _answers(self) -> bool:
        try:
            socket.create_connection(self._place, timeout=ANSWER_S).close()
        except OSError:
            return False
        return True
