"""Waiting for something, and the processes of this machine as /proc has them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def wait_for(holds: Callable[[], object], timeout_s: float, message: Callable[[], str]) -> None:
    """Wait until something holds; fail with the message where it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"after {timeout_s:g} s: {message()}")
        time.sleep(0.1)


def environment_of(pid: int) -> dict[str, str]:
    """The environment a process was started with; empty where it is gone."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in raw.split(b"\0") if b"=" in entry)
    return {key.decode("utf-8", "replace"): value.decode("utf-8", "replace") for key, _, value in pairs}


def processes_with(name: str, value: str) -> dict[int, str]:
    """Processes that have this variable in their environment: pid and command line. Zombies do not count.

    Children inherit it, in whatever session or process group they are: so nothing of a run escapes.
    """
    return {pid: command for pid, command in _all_processes() if environment_of(pid).get(name) == value}


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    return any(found == pid for found, _ in _all_processes())


def _all_processes() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if state != "Z":
            yield int(folder.name), command.strip()


def listening_addresses(pids: set[int]) -> set[str]:
    """`address:port` of the TCP sockets on which these processes listen, as /proc/net writes the address."""
    inodes = set()
    for pid in pids:
        try:
            links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        inodes |= {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add(f"{address}:{int(port, 16)}")
    return found
