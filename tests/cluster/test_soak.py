"""Hundreds of random kills under one captioning job (`make soak`; SOAK_KILLS and SOAK_ROWS change how many).

Stages are killed and stopped, workers that prepare or write are killed, and now and then the driver itself, after which
the same command goes on. In the end the output is that of an undisturbed run, and nothing has piled up: no process, no
file in shared memory, no open file.
"""

from __future__ import annotations

import os
import random
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
LONGEST_S = 1500.0

FAULTS = {"kill a stage": 60, "stop a stage": 8, "kill a worker": 25, "kill the driver": 7}


def test_random_kills(model: Path, tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "pictures.parquet", ROWS, bad=False)
    options = ("--stages", 2, "--spares", 1, "--rows-per-shard", 100, "--max-new-tokens", 16, "--with-token-ids")
    options += ("--temperature", 0.7, "--seed", 5, "--max-restarts", 10)
    with started(caption_command(model, source, tmp_path / "quiet", *options)) as run:
        assert run.wait(600) == 0, run.stderr

    chance = random.Random(7)
    done: Counter[str] = Counter()
    counts: list[tuple[int, int, int]] = []
    before, deadline = shared_memory(), time.monotonic() + LONGEST_S
    command = caption_command(model, source, tmp_path / "soaked", *options)
    runs = 0
    while not (tmp_path / "soaked" / "_SUCCESS").exists():
        runs += 1
        with started(command) as run:
            while run.process.poll() is None:
                assert time.monotonic() < deadline, f"after {done}: {run.stderr[-3000:]}"
                time.sleep(chance.uniform(0.5, 6))
                if done.total() < KILLS:
                    fault = chance.choices(list(FAULTS), list(FAULTS.values()))[0]
                    done[fault] += strike(run, fault, chance)
                counts.append((len(run.processes()), shared_memory() - before, open_files(run)))
            status = run.process.returncode
            assert status in (0, -signal.SIGKILL), f"status {status} after {done}: {run.stderr[-3000:]}"
            run.wait_for_no_process(60)
    print(f"{done.total()} faults in {runs} runs: {dict(done)}; processes, shared memory, files: {counts[-3:]}")
    assert told_of(tmp_path / "soaked") == told_of(tmp_path / "quiet")
    assert not list((tmp_path / "soaked").glob("_tmp*"))
    assert max(processes for processes, _, _ in counts) < 40
    assert max(files for _, _, files in counts) < 1500
    assert shared_memory() <= before


def strike(run: Run, fault: str, chance: random.Random) -> int:
    """Do it, where there is somebody to do it to; how often it was done."""
    if fault == "kill the driver":
        victims = [run.process.pid]
    else:
        wanted = "ray::StageActor" if "stage" in fault else ("ray::prepare", "ray::write")
        victims = [pid for pid, name in run.processes().items() if name.startswith(wanted)]
    if not victims:
        return 0
    with suppress(ProcessLookupError):
        os.kill(chance.choice(victims), signal.SIGSTOP if "stop" in fault else signal.SIGKILL)
        return 1
    return 0


def shared_memory() -> int:
    return len(list(Path("/dev/shm").iterdir()))


def open_files(run: Run) -> int:
    """Of the driver."""
    with suppress(OSError):
        return len(list(Path(f"/proc/{run.process.pid}/fd").iterdir()))
    return 0


def told_of(output: Path) -> list[Any]:
    return [(row["id"], row["status"], row["caption"], row["token_ids"]) for row in rows_of(output)]
