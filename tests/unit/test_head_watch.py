"""A head that goes away ends the process with its own status; one that answers does nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

from ray_ministral.driver.head_watch import HeadWatch

PROGRAM = """
import logging, socket, sys, time
logging.basicConfig(format="%(message)s")
from ray_ministral.driver import head_watch
head_watch.ASK_EVERY_S = 0.05
with socket.create_server(("127.0.0.1", 0)) as server:
    address = "127.0.0.1:%d" % server.getsockname()[1]
    with head_watch.HeadWatch(address, patience_s=0.3):
        time.sleep(1)
        print("alive", flush=True)
        server.close()
        time.sleep(60)
print("too late")
"""


def test_a_head_that_goes_away_ends_the_process_with_status_4() -> None:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 4, done.stderr
    assert done.stdout == "alive\n"
    assert "has not answered" in done.stderr
    assert "the same command goes on" in done.stderr
    assert time.monotonic() - begun < 40


def test_it_ends_with_its_context() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, HeadWatch(f"127.0.0.1:{server.getsockname()[1]}") as watch:
        assert watch._thread.is_alive()
    assert not watch._thread.is_alive()
