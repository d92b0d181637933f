"""`Holder`: who has the lease of an output folder, and whether that process still lives."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Holder:
    """What a lease says. `run` is a UUID; `since` is for people, by the holder's clock.

    `process_start` counts in clock ticks since the machine was booted. It, `boot` and `pid_namespace`, which together
    say what a pid means, are empty where the system does not tell (there is no /proc).
    """

    run: str
    host: str
    pid: int
    process_start: str
    boot: str
    pid_namespace: str
    since: str
    heartbeat_s: float
    counter: int = 0

    @classmethod
    def this_process(cls, heartbeat_s: float) -> Holder:
        """A new holder."""
        return cls(
            run=str(uuid.uuid4()),
            host=socket.gethostname(),
            pid=os.getpid(),
            process_start=_process(os.getpid())[1],
            boot=_text("/proc/sys/kernel/random/boot_id"),
            pid_namespace=_pid_namespace(),
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            heartbeat_s=heartbeat_s,
        )

    def describe(self) -> str:
        """For people."""
        return f"process {self.pid} on {self.host}, since {self.since}"

    def to_bytes(self) -> bytes:
        """The content of the file."""
        return (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> Holder | None:
        """None for what is no lease: torn, or of another program."""
        try:
            value = json.loads(data)
            kinds = {"pid": int, "heartbeat_s": float, "counter": int}
            return cls(**{key: kinds.get(key, str)(each) for key, each in value.items()})
        except (ValueError, TypeError, AttributeError):
            return None

    def state(self) -> Literal["alive", "gone", "unknown"]:
        """Whether its process lives, as far as this one can see."""
        here = (_text("/proc/sys/kernel/random/boot_id"), _pid_namespace())
        if not all(here) or (self.boot, self.pid_namespace) != here or not self.process_start:
            return "unknown"
        process_state, start = _process(self.pid)
        if start:
            return "alive" if start == self.process_start and process_state not in "ZX" else "gone"
        try:
            os.kill(self.pid, 0)  # asks only
        except ProcessLookupError:
            return "gone"
        except OSError:
            pass
        return "unknown"  # /proc hides other people's processes


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, str]:
    """State (a letter) and start (clock ticks since boot) of a process; empty where there is none, or no /proc."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")
