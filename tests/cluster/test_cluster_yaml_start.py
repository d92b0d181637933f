"""The start command of cluster.yaml, run on this machine: it wants a token, and listens on the loopback.

Only what a single machine forces upon us is changed: ports, folders, the place of `ray`, no autoscaler. The head is
started with `--block`, so that it ends with a process of ours, and nothing is stopped by name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")
TOKEN = "0123456789abcdef" * 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_command(home: Path, port: int, dashboard_port: int) -> str:
    """The head's start command of cluster.yaml, for this machine."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    (command,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    replaced = {
        r"~/venv/bin/ray\b": str(RAY),
        r"PATH=~/venv/bin:\$PATH ": f"PATH={RAY.parent}:$PATH ",
        r"--port=\d+": f"--port={port}",
        r" --object-manager-port=\d+": "",
        r" --autoscaling-config=\S+": "",
        r"ulimit -n \d+;": "",
    }
    for pattern, value in replaced.items():
        assert re.search(pattern, command), f"cluster.yaml starts Ray without {pattern}"
        command = re.sub(pattern, value, command)
    assert "~" not in command, command
    return (
        f"exec env {command} --block --num-cpus=1 --temp-dir={home}/r --dashboard-port={dashboard_port}"
        f" --dashboard-agent-listen-port={free_port()} --object-store-memory=100000000"
    )


@dataclass(frozen=True)
class Head:
    jobs: str  # the URL of the jobs API
    dashboard_port: int


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # A short path: Ray puts sockets there, whose names have at most 107 characters.
    home = Path(tempfile.mkdtemp(prefix="rm", dir="/tmp"))
    (home / ".ray").mkdir(mode=0o700)
    (home / ".ray" / "auth_token").write_text(TOKEN)
    # The mode comes from the command under test and the token from the home directory, from nowhere else.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["HOME"] = str(home)
    dashboard_port = free_port()
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", start_command(home, free_port(), dashboard_port)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            head = Head(f"http://127.0.0.1:{dashboard_port}/api/jobs/", dashboard_port)
            deadline = time.monotonic() + 90
            while (status := request(head.jobs, TOKEN)[0]) != 200:
                assert process.poll() is None, (home / "log").read_text()
                assert time.monotonic() < deadline, f"no jobs API, last status {status}: {(home / 'log').read_text()}"
                time.sleep(0.5)
            yield head
        finally:
            # Ctrl-C ends at once; on SIGTERM a node is drained first, for half a minute.
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            # Whatever the head left behind; the session is ours alone.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=20)
            shutil.rmtree(home, ignore_errors=True)


def request(url: str, token: str | None, body: object = None) -> tuple[int, str]:
    """Status and text of a request; 0 while nobody listens."""
    asked = urllib.request.Request(url, data=None if body is None else json.dumps(body).encode())
    asked.add_header("Content-Type", "application/json")
    if token is not None:
        asked.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code), error.read().decode()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return 0, ""


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, "wrong" * 8])
def test_without_the_token_no_command_runs(head: Head, token: str | None, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    status, _ = request(head.jobs, token, {"entrypoint": f"touch {proof}"})
    assert status in {401, 403}
    # The list of jobs is closed as well, and shows, with the token, that none was made.
    assert request(head.jobs, token)[0] in {401, 403}
    assert request(head.jobs, TOKEN) == (200, "[]")
    assert not proof.exists()


def listening_addresses(port: int) -> set[str]:
    """The local addresses, as /proc writes them, on which a TCP port of this machine is listened to."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, number = local.split(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's list of sockets")
def test_the_dashboard_listens_on_the_loopback_only(head: Head) -> None:
    assert listening_addresses(head.dashboard_port) == {"0100007F"}


def test_the_instrument_sees_every_interface() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        assert listening_addresses(server.getsockname()[1]) == {"00000000"}


def test_the_setup_closes_the_token_file(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    (command,) = [line for line in config["setup_commands"] if "auth_token" in line]
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o755)
    token.write_text(TOKEN)
    token.chmod(0o644)
    subprocess.run(["bash", "-c", command], env={**os.environ, "HOME": str(tmp_path)}, check=True, timeout=30)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
