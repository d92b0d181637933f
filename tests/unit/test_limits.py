"""Limits of a process that decodes foreign bytes: what they stop, what they leave behind, what they cost."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ray_ministral.data.limits import deadline, lift_limits, memory_limit

ROOT = Path(__file__).resolve().parents[2]
MANY = 1 << 30


def run(source: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A program in a process that may die."""
    return subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **options
    )


@pytest.mark.parametrize(
    "eat",
    [
        lambda: bytearray(MANY),
        lambda: np.ones(MANY, np.uint8),
        lambda: Image.new("RGB", (20_000, 20_000)),
        lambda: pa.allocate_buffer(MANY),
        lambda: [bytearray(1 << 20) for _ in range(MANY >> 20)],
    ],
    ids=["python", "numpy", "pillow", "arrow", "many"],
)
def test_memory_above_the_limit_is_a_memory_error_and_the_limit_goes(eat: object) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    assert callable(eat)
    with pytest.raises(MemoryError), memory_limit(200 << 20):
        eat()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytearray(MANY)) == MANY, "without the limit there is room"


def test_memory_below_the_limit_is_there_however_much_the_process_has() -> None:
    held = np.ones(300 << 20, np.uint8)
    with memory_limit(200 << 20):
        assert bytearray(100 << 20)
    assert held[-1] == 1


def test_a_lower_limit_of_the_process_stays() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (100 << 30, hard))
        with memory_limit(200 << 30):
            assert resource.getrlimit(resource.RLIMIT_DATA) == (100 << 30, hard)
        assert resource.getrlimit(resource.RLIMIT_DATA) == (100 << 30, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


ENDLESS = {
    "holds the GIL": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "sleeps": "import time; time.sleep(60)",
    "in a lock": "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
}


@pytest.mark.parametrize("endless", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize("ignored", [False, True], ids=["", "SIGALRM is ignored"])
def test_what_takes_longer_than_the_deadline_ends_the_process(endless: str, ignored: bool) -> None:
    started = time.monotonic()
    begin = "import signal; signal.signal(signal.SIGALRM, signal.SIG_IGN)\n" if ignored else ""
    ended = run(f"{begin}from ray_ministral.data.limits import deadline\nwith deadline(0.5):\n    {endless}")
    assert ended.returncode == -signal.SIGALRM
    assert ended.stdout + ended.stderr == "", "it says nothing in the worker's log"
    assert time.monotonic() - started < 30


def test_what_is_done_in_time_is_left_alone() -> None:
    for _ in range(3):
        with deadline(0.2):
            pass
    with pytest.raises(KeyError), deadline(0.2):
        raise KeyError
    time.sleep(0.3)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_an_interrupted_limit_left_is_taken_away() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    signal.setitimer(signal.ITIMER_REAL, 60)
    resource.setrlimit(resource.RLIMIT_DATA, (50 << 30, before[1]))
    lift_limits()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_both_cost_less_than_fifty_microseconds() -> None:
    best = 1.0
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(100):
            with deadline(60.0), memory_limit(MANY):
                pass
        best = min(best, (time.perf_counter() - started) / 100)
    assert best < 50e-6
