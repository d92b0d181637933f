"""Limits for what runs over foreign bytes: how much memory it may add to this process, and how long it may take.

Both hold for the whole process, so only one thread of it may be inside at a time, and both cost a few microseconds.
Too much memory is a MemoryError. A deadline ends the process: a decoder is C code, which nothing else stops.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_STATM = "/proc/self/statm"
_DATA_FIELD = 5
"""proc(5): pages of data and stack, which is what RLIMIT_DATA counts, and the stack."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_FIRST_LIMIT, _ = resource.getrlimit(resource.RLIMIT_DATA)


@contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Within it this process can have at most `more_bytes` of memory of its own beside what it has when it begins.

    RLIMIT_DATA counts private writable memory alone: not a Ray worker's view of the object store, nor libraries, both
    of which RLIMIT_AS would count. What is asked of the kernel beyond the limit is refused: malloc, numpy, Pillow and
    Arrow then raise MemoryError (ArrowMemoryError is one), and a library that cannot take the refusal ends the process.
    Does nothing where there is no /proc (not Linux). A limit that is lower already stays.
    """
    used = _data_bytes()
    if used is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = [used + more_bytes, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(allowed), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """What takes longer ends this process, by SIGALRM.

    The kernel does it, so neither C code that keeps the GIL nor a blocked thread is in the way. (Python's own
    `faulthandler.dump_traceback_later` does as much with a thread for each call, at forty times the cost.) Takes
    ITIMER_REAL, and SIGALRM where somebody handles or ignores it; then only the main thread may call it.
    """
    if signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def lift_limits() -> None:
    """Take away what a limit left behind that was interrupted (a task that is cancelled is, anywhere)."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (_FIRST_LIMIT, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _data_bytes() -> int | None:
    try:
        with open(_STATM, "rb", buffering=0) as statm:
            return int(statm.read().split()[_DATA_FIELD]) * _PAGE_BYTES
    except FileNotFoundError:
        return None
