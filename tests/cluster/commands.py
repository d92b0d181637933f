"""`jobs/caption.py` as a process of its own, with every process that it starts marked in its environment."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.processes import environment_of, processes_with, wait_for

ROOT = Path(__file__).resolve().parents[2]
MARK = "RAY_MINISTRAL_TEST_RUN"
END_TIMEOUT_S = 240.0


@dataclass
class Run:
    """A running command. `folder` is its working directory, its home, and where Ray keeps its session."""

    process: subprocess.Popen[bytes]
    mark: str
    folder: Path

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def processes(self) -> dict[int, str]:
        """What the command has started and still runs, itself included."""
        return processes_with(MARK, self.mark)

    def wait(self, timeout_s: float = END_TIMEOUT_S) -> int:
        """Its exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:g} s: {self.stderr}") from None

    def wait_for_no_process(self, timeout_s: float = 30) -> None:
        """Nothing that it started may outlive it for long."""
        wait_for(lambda: not self.processes(), timeout_s, lambda: f"left behind: {self.processes()}")


@contextmanager
def started(command: list[str], **environment: str) -> Iterator[Run]:
    """Start a command in a folder and a session of its own; whatever is left of it afterwards is killed by pid."""
    # A short path: Ray puts sockets there, whose names have at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="rm", dir="/tmp"))
    mark = secrets.token_hex(8)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "PYTHONPATH"}
    inherited |= {"HOME": str(folder), "RAY_TMPDIR": str(folder), MARK: mark} | environment
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command, cwd=folder, env=inherited, stdout=stdout, stderr=stderr, start_new_session=True
        )
        run = Run(process, mark, folder)
        try:
            yield run
        finally:
            for pid in run.processes():
                if environment_of(pid).get(MARK) == mark:  # still ours, and not a newcomer with its number
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.wait(timeout=30)
            run.wait_for_no_process()  # they could still write into the folder
            shutil.rmtree(folder, ignore_errors=True)


def caption_command(model: Path, source: Path, output: Path, *more: Any) -> list[str]:
    """The command line of a small job on a local cluster."""
    options = ["--model", model, "--input", source, "--output", output, "--address", "local", "--threads-per-stage", 1]
    options += ["--max-new-tokens", 24, "--rows-per-shard", 8, *more]
    return [sys.executable, str(ROOT / "jobs" / "caption.py"), *map(str, options)]
