"""A driver that is killed in the middle of a commit, two jobs on one output, a disk that is full; on a real cluster."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_ministral import caption
from ray_ministral.data.ledger import Ledger
from ray_ministral.data.parts import Attempt
from ray_ministral.driver import tasks
from ray_ministral.driver.summary import CaptionSummary
from ray_ministral.errors import LeaseLostError, OutputError
from tests.cluster.commands import ROOT, Run, caption_command, started
from tests.cluster.conftest import leftovers
from tests.cluster.inputs import make_config, read_output, rows_of
from tests.cluster.processes import wait_for

pytestmark = pytest.mark.usefixtures("clean_cluster")

STEPS = ("_check_lease", "_announce", "_rename", "_sync", "_enter")


@pytest.fixture(scope="module")
def undisturbed(
    cluster: None, model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CaptionSummary, Path]:
    """The pictures captioned without any fault."""
    output = tmp_path_factory.mktemp("undisturbed")
    return caption(make_config(model, pictures, output, stages=1)), output


# jobs/caption.py with a ledger that kills its own process in a step of its second commit, before the step or after it.
DEADLY = """
import os, runpy, signal, sys
from ray_ministral.data.ledger import Ledger

step, when, script = sys.argv[1], sys.argv[2], sys.argv[3]
sys.argv = sys.argv[3:]
real, commit, commits = getattr(Ledger, step), Ledger.commit, 0

def counted(self, *arguments, **options):
    global commits
    commits += 1
    return commit(self, *arguments, **options)

def deadly(self, *arguments):
    if commits == 2 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, *arguments)
    if commits == 2 and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)

Ledger.commit = counted
setattr(Ledger, step, deadly)
runpy.run_path(script, run_name="__main__")
"""


# jobs/caption.py that is told to stop in the middle of its first commit, on a disk that takes its time.
INTERRUPTED = """
import os, runpy, signal, sys, time
from ray_ministral.data.ledger import Ledger

real, told = Ledger._rename, False

def rename(self, attempt):
    global told
    if not told:  # a second signal would end the leaving, too
        os.kill(os.getpid(), signal.SIGTERM)
    told = True
    time.sleep(0.5)
    real(self, attempt)

Ledger._rename = rename
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def joined(command: list[str], *, killed: tuple[str, str] | None = None) -> Any:
    """The command, on the cluster that the tests share: what a dead driver leaves there can be seen."""
    command = [*command, "--address", ray.get_runtime_context().gcs_address]
    if killed is not None:
        command = [command[0], "-c", DEADLY, *killed, *command[1:]]
    # The shared cluster listens on the loopback interface alone, as `driver.cluster` lets a local one do.
    environment = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
    environment["RAY_AUTH_TOKEN"] = os.environ["RAY_AUTH_TOKEN"]
    return started(command, PYTHONPATH=str(ROOT), **environment)


def finish(run: Run, status: int = 0) -> None:
    assert run.wait(100) == status, run.stderr
    run.wait_for_no_process()
    wait_for(lambda: not leftovers(), 60, lambda: f"left on the cluster: {leftovers()}")


def check_whole(output: Path, undisturbed: Path) -> None:
    """Equal to the undisturbed run, row by row; nothing half done lies about."""
    assert read_output(output).equals(read_output(undisturbed))
    names = {path.name for path in output.iterdir()}
    assert {"_SUCCESS", "summary.json", "_job.json", "_ledger"} <= names
    assert not [path for path in output.rglob("*") if path.name.startswith("_tmp.")]
    assert "_lease.json" not in names
    parts = {path.name for path in output.glob("part-*.parquet")}
    assert {path.name for path in (output / "_ledger").glob("part-*")} == {f"{part}.json" for part in parts}
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["rows"], summary["ok"]) == (len(rows_of(output)), 40)


def killed_and_resumed(
    model: Path, pictures: Path, output: Path, undisturbed: Path, deaths: Sequence[tuple[str, str]]
) -> None:
    """One job, whose driver dies once at each of these steps, and which then is let live."""
    command = caption_command(model, pictures, output, "--stages", 1)
    before: dict[str, bytes] = {}
    for death in deaths:
        with joined(command, killed=death) as run:
            finish(run, -signal.SIGKILL)
        assert not (output / "_SUCCESS").exists()
        entries = {path.name: path.read_bytes() for path in (output / "_ledger").glob("part-*")}
        assert before.items() < entries.items(), "what was committed stays so, and a part was added"
        before = entries
    with joined(command) as run:
        finish(run)
        stderr = run.stderr
    assert "is gone: taking over" in stderr
    check_whole(output, undisturbed)


def test_a_driver_that_is_killed_while_it_commits(
    undisturbed: tuple[CaptionSummary, Path], model: Path, pictures: Path, tmp_path: Path
) -> None:
    """At the step that matters most: it leaves a part that has its name and no entry."""
    output = tmp_path / "out"
    killed_and_resumed(model, pictures, output, undisturbed[1], [("_rename", "after")])


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_driver_that_is_killed_at_every_step_of_a_commit(
    undisturbed: tuple[CaptionSummary, Path], model: Path, pictures: Path, tmp_path: Path, when: str
) -> None:
    deaths = [(step, when) for step in STEPS]
    killed_and_resumed(model, pictures, tmp_path / "out", undisturbed[1], deaths)


def test_the_second_of_two_jobs_on_one_output_is_refused(
    undisturbed: tuple[CaptionSummary, Path], model: Path, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = caption_command(model, pictures, output, "--stages", 1)
    with joined(command) as first:
        wait_for((output / "_lease.json").exists, 60, lambda: f"no lease: {first.stderr}")
        with joined(command) as second:
            assert second.wait(60) == 2, second.stderr
            (line,) = second.stderr.strip().splitlines()
            assert line.startswith("error: "), line
            assert f"is being written by another job (process {first.process.pid} on " in line
        assert first.process.poll() is None, "it was refused while the first one ran"
        finish(first)
    check_whole(output, undisturbed[1])


def test_what_is_whole_is_committed_before_leaving(
    undisturbed: tuple[CaptionSummary, Path], model: Path, pictures: Path, tmp_path: Path
) -> None:
    """Nothing that was written is done again, and nothing is left of the job."""
    output = tmp_path / "out"
    command = caption_command(model, pictures, output, "--stages", 1)
    with joined([command[0], "-c", INTERRUPTED, *command[1:]]) as run:
        finish(run, 130)
        assert run.stderr.strip().splitlines()[-1].startswith("stopped: ")
        assert "not committed" not in run.stderr
        assert "not written" not in run.stderr
        whole = re.search(r"committing (\d+) parts that are whole", run.stderr)
    assert whole is not None
    assert len(list((output / "_ledger").glob("part-*"))) >= int(whole[1]) >= 1
    assert not (output / "_lease.json").exists()
    summary = caption(make_config(model, pictures, output, stages=1))
    assert summary.ok == undisturbed[0].ok
    check_whole(output, undisturbed[1])


def test_a_full_disk_in_a_worker_and_then_room(
    undisturbed: tuple[CaptionSummary, Path],
    model: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker that writes may not make files of more than a kilobyte: the kernel says EFBIG in mid-write."""
    genuine = tasks.write._function

    def cramped(*arguments: Any, **options: Any) -> Attempt:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            attempt: Attempt = genuine(*arguments, **options)
            return attempt
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    make: Any = ray.remote
    output = tmp_path / "out"
    config = make_config(model, pictures, output, stages=1)
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "write", make(num_cpus=0, max_retries=3, retry_exceptions=[OSError])(cramped))
        with pytest.raises(OutputError, match=r"part-.*there is no room: .*the same command goes on") as raised:
            caption(config)
    assert raised.value.exit_status == 4
    assert sorted(path.name for path in output.iterdir()) == ["_job.json", "_ledger"]
    assert not list((output / "_ledger").glob("part-*"))
    assert caption(config).rows == undisturbed[0].rows
    check_whole(output, undisturbed[1])


def test_a_job_that_is_taken_over_stops(
    cluster: None, model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a long pause of this machine: another job has written its name over ours."""
    output = tmp_path / "out"
    real = Ledger._sync

    def taken(self: Ledger) -> None:
        real(self)
        lease = json.loads((output / "_lease.json").read_text())
        (output / "_lease.json").write_text(json.dumps(lease | {"run": "another", "host": "far"}))

    monkeypatch.setattr(Ledger, "_sync", taken)
    with pytest.raises(LeaseLostError, match=r"another job has taken over --output .* on far"):
        caption(make_config(model, pictures, output, stages=1))
    assert json.loads((output / "_lease.json").read_text())["run"] == "another"
    assert len(list((output / "_ledger").glob("part-*"))) <= 1


@pytest.mark.slow
def test_failed_rows_are_replaced_in_their_part(
    undisturbed: tuple[CaptionSummary, Path], model: Path, pictures: Path, tmp_path: Path
) -> None:
    """Rows of a part that failed get their captions, the others stay, and the ledger says so."""
    output = tmp_path / "out"
    config = make_config(model, pictures, output, stages=1)
    caption(config)
    expected = rows_of(output)
    name = sorted(path.name for path in output.glob("part-*"))[-1]
    rows = [row for row in expected if row["status"] != "ok"]
    before = (output / "_ledger" / f"{name}.json").read_bytes()
    retried = caption(make_config(model, pictures, output, stages=1, retry_failed=True))
    assert retried.rows == len(expected)
    after = rows_of(output)
    assert [row["attempts"] for row in after if row["status"] != "ok"] == [2 * row["attempts"] for row in rows]
    assert [row for row in after if row["status"] == "ok"] == [row for row in expected if row["status"] == "ok"]
    assert (output / "_ledger" / f"{name}.json").read_bytes() != before
    assert not [path for path in output.rglob("*") if path.name.startswith("_tmp.")]
