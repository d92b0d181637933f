"""Training is killed while it writes a checkpoint; the same command goes on, and the curve is that of a calm run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.commands import Run, started
from tests.cluster.train_runs import curve, final_weights, metrics, train_command, write_pairs

pytestmark = pytest.mark.slow

STEPS = 8
OPTIONS = ("--steps", STEPS, "--learning-rate", 1e-3, "--warmup-steps", 2, "--clip-norm", 0.1)
EACH_STEP = ("--checkpoint-every", 1, "--keep-checkpoints", 2)


def wait_for_attempt(run: Run, output: Path, after_step: int, timeout_s: float = 240) -> Path:
    """The folder of a checkpoint of a step after `after_step`, as soon as a stage has begun to write it."""
    deadline = time.monotonic() + timeout_s
    folder = output / "checkpoints"
    while True:
        for path in folder.glob("_tmp.step-*") if folder.exists() else ():
            if int(path.name.split(".")[1].removeprefix("step-")) > after_step:
                return path
        assert run.process.poll() is None, run.stderr
        assert time.monotonic() < deadline, f"no checkpoint is written: {run.stderr}"
        time.sleep(0.0005)


def committed(output: Path) -> list[str]:
    return sorted(path.parent.name for path in (output / "checkpoints").glob("step-*/COMMITTED"))


def stage_pids(run: Run) -> list[int]:
    return sorted(pid for pid, command in run.processes().items() if "TrainActor" in command)


def test_a_kill_while_a_checkpoint_is_written_changes_no_bit(model: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.parquet")
    calm, output = tmp_path / "calm", tmp_path / "disturbed"
    with started(train_command(model, pairs, calm, *OPTIONS)) as run:
        assert run.wait() == 0, run.stderr
    expected = metrics(calm)
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))
    assert all(line["grad_norm"] > 0.1 for line in expected), "clipping is active"

    # The driver dies; nobody is left who could commit.
    with started(train_command(model, pairs, output, *OPTIONS, *EACH_STEP, "--stages", 2)) as run:
        wait_for_attempt(run, output, after_step=1)
        run.process.send_signal(signal.SIGKILL)
        run.wait(30)
        run.wait_for_no_process()
    assert not (output / "final").exists()
    good = committed(output)
    assert good, "a step before it was committed"
    done = int(good[-1].removeprefix("step-"))
    assert done < STEPS - 2, "the machine was too fast for this test: give it more steps"

    # On another number of stages, to the end; on the way there a stage dies.
    with started(train_command(model, pairs, output, *OPTIONS, *EACH_STEP, "--stages", 3)) as run:
        wait_for_attempt(run, output, after_step=done + 1)
        pids = stage_pids(run)
        assert len(pids) == 3, run.processes()
        os.kill(pids[1], signal.SIGKILL)
        assert run.wait() == 0, run.stderr
        assert "going on from" in run.stderr
        assert "is void: " in run.stderr
        assert "recoveries: 1 in" in run.stderr
        assert "Traceback" not in run.stderr
        run.wait_for_no_process()
    assert curve(metrics(output)) == curve(expected)
    assert not list((output / "checkpoints").glob("_tmp.*")), "attempts of the dead are gone"
    assert committed(output) == ["step-00000007", "step-00000008"]
    ours, theirs = final_weights(output), final_weights(calm)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
