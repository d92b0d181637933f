"""A commit that is cut short at every step, on a disk and where renaming is not atomic; and the thread that commits."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from ray_ministral.captioning.request import RowResult
from ray_ministral.data import commits as commits_module
from ray_ministral.data import files as files_module
from ray_ministral.data import lease as lease_module
from ray_ministral.data import ledger as ledger_module
from ray_ministral.data import parts as parts_module
from ray_ministral.data.commits import Commits
from ray_ministral.data.files import Location
from ray_ministral.data.ledger import Ledger
from ray_ministral.data.parts import Attempt, write_part
from ray_ministral.data.shards import Shard, plan_shards
from ray_ministral.errors import LeaseLostError, OutputError

ROOT = Path(__file__).resolve().parents[2]
PRINT = {"model": "abc"}
ROWS = 6


def attempt_at(ledger: Ledger, shard: Shard, caption: str = "new", status: str = "ok") -> Attempt:
    results = [
        RowResult(row, caption, status, None, None, "stop", 1, 1, 1, 1, None) for row in range(shard.start, shard.stop)
    ]
    return write_part(shard, results, output=ledger.output, carried_columns=["id"])


def plan(source: Path) -> list[Shard]:
    return list(plan_shards([str(source)], rows_per_shard=2).shards)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"image": [b"x"] * ROWS, "id": range(ROWS)}), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


@pytest.fixture
def shards(source: Path) -> list[Shard]:
    return plan(source)


def check_and_finish(output: Path, shards: list[Shard], *, replaced: bool) -> str:
    """Open the folder after a crash: nothing lost, twice or torn. Go on, and look again. What became of the part."""
    with closing(Ledger.open(str(output), PRINT)) as ledger:
        committed = ledger.committed()
        assert not [name for name in _all_names(output) if name.startswith("_tmp.") and "lease" not in name]
        for name, info in committed.items():
            data = (output / name).read_bytes()
            entry = json.loads((output / "_ledger" / f"{name}.json").read_text())
            table = pq.read_table(output / name)
            counts = {kind: table["status"].to_pylist().count(kind) for kind in set(table["status"].to_pylist())}
            assert (info.bytes, info.rows, info.status_counts) == (len(data), table.num_rows, counts)
            assert (entry["sha256"], entry["next"]) == (hashlib.sha256(data).hexdigest(), None)
            assert len(set(table["caption"].to_pylist())) == 1, "a mixture of two attempts"
        first, second = shards[0].part_name, shards[1].part_name
        assert first in committed, "a part that was committed is lost"
        if replaced:
            outcome = pq.read_table(output / first)["caption"][0].as_py()
        else:
            outcome = "new" if second in committed else "again"
        for shard in shards:
            if shard.part_name not in committed:
                ledger.commit(attempt_at(ledger, shard), generation=0)
        ledger.finish({})
    with closing(Ledger.open(str(output), PRINT)) as ledger:
        assert list(ledger.committed()) == [shard.part_name for shard in shards]
        assert ledger.is_finished
    assert [row for path in sorted(output.glob("part-*")) for row in pq.read_table(path)["id"].to_pylist()] == list(
        range(ROWS)
    )
    assert not [name for name in _all_names(output) if name.startswith("_tmp.")]
    return outcome


def _all_names(output: Path) -> list[str]:
    return [path.name for path in output.rglob("*")]


# A child for each step; the first one that is not killed has done them all.
KILLED_AT_EACH_STEP = """
import os, sys
from pathlib import Path
from ray_ministral.data import files, ledger as ledger_module
from ray_ministral.data.ledger import Ledger
from tests.unit.test_commits import PRINT, attempt_at, plan

source, output, replaced = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True"

def child(last_step):
    ledger = Ledger.open(str(output / str(last_step)), PRINT)
    ledger.lease._ended.set()  # its heartbeat renames files, too
    shards = plan(source)
    ledger.committed()
    ledger.commit(attempt_at(ledger, shards[0], "old", "engine_error"), generation=0)
    attempt = attempt_at(ledger, shards[0] if replaced else shards[1])
    left = last_step

    def deadly(function):
        def step(*arguments, **options):
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return function(*arguments, **options)
        return step

    for name in ("sync", "put_in_place", "write_temporary", "sync_folder"):
        patched = deadly(getattr(files, name))
        for module in (files, ledger_module):
            if hasattr(module, name):
                setattr(module, name, patched)
    ledger.commit(attempt, generation=0)
    os._exit(0)

for step in range(100):
    pid = os.fork()
    if pid == 0:
        try:
            child(step)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(status, flush=True)
    if status != 9:
        break
"""


@pytest.mark.parametrize(("replaced", "steps"), [(False, 8), (True, 13)])
def test_killed_between_any_two_steps(
    source: Path, tmp_path: Path, shards: list[Shard], replaced: bool, steps: int
) -> None:
    """The process is gone at once: nothing of it is cleaned up, and its lease stays."""
    output = tmp_path / "outputs"
    command = [sys.executable, "-c", KILLED_AT_EACH_STEP, str(source), str(output), str(replaced)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    statuses = [int(line) for line in run.stdout.split()]
    assert statuses == [9] * (len(statuses) - 1) + [0], run.stderr
    assert len(statuses) > steps, "the steps that it was killed at are all of them"
    outcomes = []
    for step in range(len(statuses)):
        assert (output / str(step) / "_lease.json").exists()
        outcomes.append(check_and_finish(output / str(step), shards, replaced=replaced))
    before, after = ("old", "new") if replaced else ("again", "new")
    turn = outcomes.index(after)
    assert outcomes == [before] * turn + [after] * (len(outcomes) - turn), outcomes
    assert 0 < turn < len(outcomes) - 1


@pytest.mark.parametrize("step", ["_rename", "_sync"])
def test_two_files_of_one_size_are_told_apart(
    tmp_path: Path, shards: list[Shard], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    output = tmp_path / "out"
    with closing(Ledger.open(str(output), PRINT)) as ledger:
        old = attempt_at(ledger, shards[0], "old")
        ledger.commit(old, generation=0)
        new = attempt_at(ledger, shards[0], "new")
        assert old.info.bytes == new.info.bytes
        assert old.sha256 != new.sha256

        def die(*_: object) -> None:
            raise Died

        with monkeypatch.context() as patch:
            patch.setattr(Ledger, step, die)
            with pytest.raises(Died):
                ledger.commit(new, generation=1)
    with closing(Ledger.open(str(output), PRINT)) as ledger:
        ledger.committed()
        entry = ledger._entry_of(shards[0].part_name)
    assert entry is not None
    assert (entry.sha256, entry.generation) == ((old.sha256, 0) if step == "_rename" else (new.sha256, 1))
    assert entry.next is None
    caption = pq.read_table(output / shards[0].part_name)["caption"][0].as_py()
    assert caption == ("old" if step == "_rename" else "new")


class Died(Exception):
    pass


class HalfMoves(LocalFileSystem):
    """A filesystem whose rename copies, and may die with half of it done; its deaths are counted down in `left`."""

    left: int | None = None

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        source, destination = Path(path1), Path(path2)
        data = source.read_bytes()
        if self.left is not None and destination.name.startswith("part-"):
            if self.left == 0:
                destination.write_bytes(data[: len(data) // 2])
                raise Died
            self.left -= 1
        destination.write_bytes(data)
        source.unlink()


def leave_as_killed(ledger: Ledger) -> None:
    """The lease is that of a process which is gone; nothing else changes."""
    ledger.lease._ended.set()
    ledger.lease._heart.join()
    gone = replace(ledger.lease._holder, process_start="1")
    path = Path(ledger._folder.path) / "_lease.json"
    path.write_bytes(gone.to_bytes())


@pytest.mark.parametrize("replaced", [False, True])
def test_half_a_rename_does_not_count(
    tmp_path: Path, shards: list[Shard], monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    store = HalfMoves(skip_instance_cache=True)
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(store))

    def fake_locate(text: str) -> Location:
        return Location(name=text, location=text, filesystem=filesystem, path=text)

    monkeypatch.setattr(ledger_module, "locate", fake_locate)
    monkeypatch.setattr(parts_module, "locate", fake_locate)
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.05)
    outcomes = []
    for dies_at in range(3 if replaced else 2):
        output = tmp_path / f"out{dies_at}"
        ledger = Ledger.open(str(output), PRINT)
        assert not ledger._folder.is_local
        ledger.commit(attempt_at(ledger, shards[0], "old", "engine_error"), generation=0)
        attempt = attempt_at(ledger, shards[0] if replaced else shards[1])
        store.left = dies_at
        with monkeypatch.context() as patch:
            for module in (files_module, ledger_module):
                patch.setattr(module, "delete_quietly", lambda place: None)  # a dead process removes nothing
            with pytest.raises(Died):
                ledger.commit(attempt, generation=0)
        store.left = None
        leave_as_killed(ledger)
        torn = [path for path in output.rglob("part-*") if path.suffix == ".parquet" and not _is_parquet(path)]
        assert len(torn) == (dies_at == (1 if replaced else 0)), "the test tears what it means to tear"
        if replaced:
            # Half an entry, or half a file in place of a whole one: the part is done again.
            with closing(Ledger.open(str(output), PRINT)) as again:
                outcomes.append(sorted(again.committed()))
                again.commit(attempt_at(again, shards[0]), generation=0)
            assert check_and_finish(output, shards, replaced=True) == "new"
        else:
            outcomes.append(check_and_finish(output, shards, replaced=False))
    assert outcomes == ([[], [], []] if replaced else ["again", "again"])


def _is_parquet(path: Path) -> bool:
    try:
        pq.read_table(path)
    except pa.ArrowException:
        return False
    return True


# --- the thread ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger.open(str(tmp_path / "out"), PRINT)) as ledger:
        yield ledger


def test_commits_come_back_in_order(ledger: Ledger, shards: list[Shard]) -> None:
    with Commits(ledger) as commits:
        assert commits.is_idle
        assert commits.done() == []
        for shard in shards:
            commits.submit(shard.index, attempt_at(ledger, shard), generation=2)
        assert not commits.is_idle
        found = []
        while len(found) < len(shards):
            assert commits.wait(10)
            found += commits.done()
        assert commits.is_idle
        assert [(commit.shard_index, commit.info.name) for commit in found] == [
            (shard.index, shard.part_name) for shard in shards
        ]
        assert not commits.wait(0.01), "nothing is left to say"
    assert list(ledger.committed()) == [shard.part_name for shard in shards]


def test_what_was_submitted_is_committed_on_the_way_out(
    ledger: Ledger, shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Ledger._rename

    def slow(self: Ledger, attempt: Attempt) -> None:
        time.sleep(0.2)
        real(self, attempt)

    monkeypatch.setattr(Ledger, "_rename", slow)
    attempts = [attempt_at(ledger, shard) for shard in shards]
    with Commits(ledger) as commits:
        started = time.monotonic()
        for shard, attempt in zip(shards, attempts, strict=True):
            commits.submit(shard.index, attempt, generation=0)
        assert commits.done() == []
        assert time.monotonic() - started < 0.2, "the loop is not held up"
    assert list(ledger.committed()) == [shard.part_name for shard in shards]
    assert not commits._thread.is_alive()


def test_a_disk_that_hangs_does_not_keep_the_job(
    ledger: Ledger, shards: list[Shard], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hangs, released = threading.Event(), threading.Event()
    real = Ledger._rename

    def hang(self: Ledger, attempt: Attempt) -> None:
        real(self, attempt)
        hangs.set()
        released.wait(30)

    monkeypatch.setattr(Ledger, "_rename", hang)
    monkeypatch.setattr(commits_module, "LEAVE_S", 0.3)
    commits = Commits(ledger)
    for shard in shards[:2]:
        commits.submit(shard.index, attempt_at(ledger, shard), generation=0)
    assert hangs.wait(10)
    started = time.monotonic()
    commits.close(0.3)
    assert time.monotonic() - started < 2
    assert (
        f"not committed, and done again by the same command: {shards[0].part_name}, {shards[1].part_name}"
        in caplog.text
    )
    commits.close(30)  # at once: it is closed
    assert commits._thread.daemon
    # The folder is given back meanwhile: what goes on now must not enter anything.
    ledger.close()
    released.set()
    commits._thread.join(10)
    assert isinstance(commits._error, LeaseLostError)
    with closing(Ledger.open(ledger.output, PRINT)) as again:
        assert again.committed() == {}


@pytest.mark.parametrize("error", [OutputError("no room"), ZeroDivisionError("a bug")])
def test_an_error_is_raised_in_the_loop_and_nothing_is_committed_after_it(
    ledger: Ledger, shards: list[Shard], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(self: Ledger) -> None:
        raise error

    with Commits(ledger) as commits:
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "_sync", fail)
            commits.submit(0, attempt_at(ledger, shards[0]), generation=0)
            assert commits.wait(10)
            commits._thread.join(10)
        commits.submit(1, attempt_at(ledger, shards[1]), generation=0)
        for _ in range(2):
            with pytest.raises(type(error)):
                commits.done()
    assert ledger.committed() == {}


def test_a_lease_that_the_heartbeat_has_lost_ends_the_loop(ledger: Ledger) -> None:
    with Commits(ledger) as commits:
        ledger.lease._lost = "process 5 on elsewhere"
        with pytest.raises(LeaseLostError, match="process 5 on elsewhere"):
            commits.done()
