"""Hundreds of random kills under captioning jobs (`make soak`; SOAK_KILLS and SOAK_ROWS change how many).

Stages are killed and stopped, workers that prepare or write are killed, and now and then the driver itself, after which
the same command goes on. A job that is done is followed by another one, until there were enough. Each output is that of
an undisturbed run, and in the end nothing has piled up: no process, no file in shared memory, no open file.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.commands import Run, caption_command, started
from tests.cluster.inputs import rows_of, write_pictures

pytestmark = [pytest.mark.slow, pytest.mark.soak]

KILLS = int(os.environ.get("SOAK_KILLS", "200"))
ROWS = int(os.environ.get("SOAK_ROWS", "3000"))
LONGEST_S = 2400.0

FAULTS = {"kill a stage": 50, "stop a stage": 3, "kill a worker": 42, "kill the driver": 5}

PATIENCE_S = 12.0
"""The next fault comes when rows were done since the last one, or after so long: then it strikes a recovery."""


def test_random_kills(model: Path, tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "pictures.parquet", ROWS, bad=False)
    options = ("--stages", 2, "--spares", 1, "--rows-per-shard", 100, "--max-new-tokens", 48, "--with-token-ids")
    options += ("--temperature", 0.7, "--seed", 5, "--max-restarts", 10)
    with started(caption_command(model, source, tmp_path / "quiet", *options)) as run:
        assert run.wait(600) == 0, run.stderr

    soak = Soak(random.Random(7))
    outputs: list[Path] = []
    before = shared_memory()
    while soak.done.total() < KILLS:
        outputs.append(tmp_path / f"soaked-{len(outputs)}")
        while not (outputs[-1] / "_SUCCESS").exists():
            with started(caption_command(model, source, outputs[-1], *options)) as run:
                soak.disturb(run)
                run.wait_for_no_process(120)  # Ray's agents outlive a killed driver by a minute
    print(f"{soak.done.total()} faults in {soak.runs} runs of {len(outputs)} jobs: {dict(soak.done)}")
    print(f"processes, shared memory, open files at the end of each run: {soak.last}")
    for output in outputs:
        assert told_of(output) == told_of(tmp_path / "quiet")
        assert not list(output.glob("_tmp*"))
    assert soak.most_processes < 40
    assert soak.most_files < 1500
    assert shared_memory() <= before


class Soak:
    """Faults so far, and how much there was of what might pile up."""

    def __init__(self, chance: random.Random) -> None:
        self.done: Counter[str] = Counter()
        self.runs = self.most_processes = self.most_files = 0
        self.last: list[tuple[int, int, int]] = []
        self._chance = chance
        self._deadline = time.monotonic() + LONGEST_S

    def disturb(self, run: Run) -> None:
        """Until its end."""
        self.runs += 1
        counts = (0, 0, 0)
        rows, struck_at = -1, time.monotonic()
        while run.process.poll() is None:
            assert time.monotonic() < self._deadline, f"after {self.done}: {run.stderr[-3000:]}"
            time.sleep(self._chance.uniform(0.2, 2))
            counts = len(run.processes()), shared_memory(), open_files(run)
            self.most_processes, self.most_files = max(self.most_processes, counts[0]), max(self.most_files, counts[2])
            now = rows_done(run)
            if self.done.total() < KILLS and (now > rows or time.monotonic() - struck_at > PATIENCE_S):
                fault = self._chance.choices(list(FAULTS), list(FAULTS.values()))[0]
                if strike(run, fault, self._chance):
                    self.done[fault] += 1
                    rows, struck_at = now, time.monotonic()
        self.last.append(counts)
        status = run.process.returncode
        assert status in (0, -signal.SIGKILL), f"status {status} after {self.done}: {run.stderr[-3000:]}"


def rows_done(run: Run) -> int:
    """As the job has shown last; 0 before."""
    shown = re.findall(r"(\d+)/\d+ rows", run.stderr)
    return int(shown[-1]) if shown else 0


def strike(run: Run, fault: str, chance: random.Random) -> bool:
    """Do it, where there is somebody to do it to; whether there was."""
    if fault == "kill the driver":
        victims = [run.process.pid]
    else:
        wanted = "ray::StageActor" if "stage" in fault else ("ray::prepare", "ray::write")
        victims = [pid for pid, name in run.processes().items() if name.startswith(wanted)]
    if not victims:
        return False
    with suppress(ProcessLookupError):
        os.kill(chance.choice(victims), signal.SIGSTOP if "stop" in fault else signal.SIGKILL)
        return True
    return False


def shared_memory() -> int:
    return len(list(Path("/dev/shm").iterdir()))


def open_files(run: Run) -> int:
    """Of the driver."""
    with suppress(OSError):
        return len(list(Path(f"/proc/{run.process.pid}/fd").iterdir()))
    return 0


def told_of(output: Path) -> list[Any]:
    return [(row["id"], row["status"], row["caption"], row["token_ids"]) for row in rows_of(output)]
