"""The lease of an output folder: who may write, who is refused, who is taken for dead, whatever the clocks say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ray_ministral.data import holder as holder_module
from ray_ministral.data import lease as lease_module
from ray_ministral.data.files import Location, locate, write_file
from ray_ministral.data.holder import Holder
from ray_ministral.data.lease import LEASE_FILE, Lease
from ray_ministral.errors import ConfigError, LeaseLostError

ROOT = Path(__file__).resolve().parents[2]
BEAT_S = 0.2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", BEAT_S)
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.1)
    monkeypatch.setattr(lease_module, "POLL_S", 0.05)


@pytest.fixture(params=["local", "local without locks", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    if request.param == "object store":
        store = MemoryFileSystem(skip_instance_cache=True)
        store.store, store.pseudo_dirs = {}, [""]
        store.mkdir("/out")
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(store))
        return Location(name="remote://out", location="remote://out", filesystem=filesystem, path="/out")
    if request.param == "local without locks":
        monkeypatch.setattr(lease_module, "_flock", lambda descriptor: False)
    return locate(str(tmp_path))


@pytest.fixture
def taken() -> Iterator[list[Lease]]:
    """Leases that are given back after the test."""
    leases: list[Lease] = []
    yield leases
    for lease in leases:
        lease.release()


def held(folder: Location) -> Holder | None:
    data = lease_module._read(folder)
    return None if data is None else Holder.parse(data)


def put(folder: Location, holder: Holder) -> None:
    write_file(folder, LEASE_FILE, holder.to_bytes())


def elsewhere(**changes: object) -> Holder:
    """A holder on another machine, whose process number is alive here by chance."""
    holder = replace(Holder.this_process(BEAT_S), host="far", boot="another boot", since="long ago")
    return replace(holder, **changes)  # type: ignore[arg-type]


def test_taken_beating_and_given_back(folder: Location, taken: list[Lease]) -> None:
    lease = Lease.take(folder)
    taken.append(lease)
    first = held(folder)
    assert first is not None
    assert (first.pid, first.counter, first.heartbeat_s) == (os.getpid(), 0, BEAT_S)
    lease.check()
    deadline = time.monotonic() + 10
    while (held(folder) or first).counter < 2:
        assert time.monotonic() < deadline, "no heartbeat"
        time.sleep(0.05)
    lease.check()
    lease.release()
    assert held(folder) is None
    assert not lease._heart.is_alive()
    taken.append(Lease.take(folder))
    with pytest.raises(LeaseLostError):
        lease.check()


def test_a_living_process_of_this_machine_is_refused_at_once(folder: Location) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        try:
            start = holder_module._process(other.pid)[1]
            put(folder, replace(Holder.this_process(60.0), host="me", pid=other.pid, process_start=start, since="noon"))
            started = time.monotonic()
            with pytest.raises(ConfigError, match=rf"another job \(process {other.pid} on me, since noon\).*--output"):
                Lease.take(folder)
            assert time.monotonic() - started < 5
        finally:
            other.kill()


def test_oneself_is_refused_too(folder: Location, taken: list[Lease]) -> None:
    taken.append(Lease.take(folder))
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
        Lease.take(folder)
    taken[0].check()


def test_a_process_of_this_machine_that_is_gone_is_taken_over_at_once(folder: Location, taken: list[Lease]) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for dead in (
        replace(Holder.this_process(60.0), pid=gone.pid),
        replace(Holder.this_process(60.0), process_start="1"),  # the number is that of another process by now
    ):
        put(folder, dead)
        started = time.monotonic()
        lease = Lease.take(folder)
        assert time.monotonic() - started < 5
        lease.check()
        lease.release()


def test_a_process_that_nobody_has_waited_for_is_gone(tmp_path: Path, taken: list[Lease]) -> None:
    folder = locate(str(tmp_path))
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    try:
        start = ""
        while not start or holder_module._process(zombie.pid)[0] != "Z":
            start = holder_module._process(zombie.pid)[1]
        put(folder, replace(Holder.this_process(60.0), pid=zombie.pid, process_start=start))
        taken.append(Lease.take(folder))
    finally:
        zombie.wait()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"boot": Holder.this_process(1.0).boot, "pid_namespace": "pid:[1]"},  # another container of this machine
        {"boot": "", "process_start": "", "pid_namespace": ""},  # a system without /proc
    ],
)
def test_a_holder_elsewhere_is_watched(
    folder: Location, taken: list[Lease], caplog: pytest.LogCaptureFixture, changes: dict[str, str]
) -> None:
    caplog.set_level("INFO")
    holder = elsewhere(**changes)
    put(folder, holder)
    started = time.monotonic()
    lease = Lease.take(folder)
    taken.append(lease)
    assert time.monotonic() - started > 3 * BEAT_S
    lease.check()
    assert "watching" in caplog.text
    assert f"no heartbeat of {holder.describe()}: taking over" in caplog.text


def test_a_holder_elsewhere_whose_counter_moves_is_refused(folder: Location) -> None:
    holder = elsewhere(heartbeat_s=2.0)
    put(folder, holder)
    timer = threading.Timer(0.3, put, [folder, replace(holder, counter=1)])
    timer.start()
    started = time.monotonic()
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on far, since long ago"):
        Lease.take(folder)
    assert time.monotonic() - started < 3, "as soon as it is known"
    timer.join()


def test_a_lease_that_is_given_back_while_it_is_watched(folder: Location, taken: list[Lease]) -> None:
    put(folder, elsewhere(heartbeat_s=20.0))
    timer = threading.Timer(0.3, folder.filesystem.delete_file, [folder.child(LEASE_FILE).path])
    timer.start()
    taken.append(Lease.take(folder))
    taken[0].check()


def test_another_one_that_takes_it_over_while_we_watch_is_looked_at(folder: Location) -> None:
    put(folder, elsewhere(heartbeat_s=20.0))
    timer = threading.Timer(0.3, put, [folder, replace(Holder.this_process(20.0), host="rival")])
    timer.start()
    with pytest.raises(ConfigError, match="on rival"):
        Lease.take(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"run": "x"}', b"\xff"])
def test_a_lease_that_cannot_be_read_is_taken_after_a_while(tmp_path: Path, taken: list[Lease], content: bytes) -> None:
    folder = locate(str(tmp_path))
    write_file(folder, LEASE_FILE, content)
    taken.append(Lease.take(folder))
    taken[0].check()


def test_what_was_taken_over_is_lost_and_left_alone(folder: Location, taken: list[Lease]) -> None:
    lease = Lease.take(folder)
    put(folder, elsewhere(run="the other"))
    with pytest.raises(LeaseLostError, match=r"another job has taken over --output .*process \d+ on far, since long"):
        lease.check()
    lease.release()
    assert (holder := held(folder)) is not None
    assert holder.run == "the other"


def test_the_heartbeat_notices_and_ends(folder: Location, taken: list[Lease]) -> None:
    taken.append(Lease.take(folder))
    # Its next beat may have been begun: what it writes then, the other one reads, and puts right.
    for _ in range(3):
        put(folder, elsewhere(run="the other", counter=7))
        taken[0]._heart.join(3 * BEAT_S)
    assert not taken[0]._heart.is_alive()
    with pytest.raises(LeaseLostError, match="on far"):
        taken[0].raise_if_lost()
    assert (holder := held(folder)) is not None
    assert (holder.run, holder.counter) == ("the other", 7)


def test_a_lease_that_was_removed_is_lost(folder: Location) -> None:
    lease = Lease.take(folder)
    folder.filesystem.delete_file(folder.child(LEASE_FILE).path)
    with pytest.raises(LeaseLostError, match="is gone"):
        lease.check()
    lease.release()
    assert held(folder) is None


def test_a_disk_that_fails_for_a_while_does_not_end_the_heartbeat(
    tmp_path: Path, taken: list[Lease], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = locate(str(tmp_path))
    lease = Lease.take(folder)
    taken.append(lease)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lease_module, "write_file", full)
        time.sleep(4 * BEAT_S)
    assert lease._heart.is_alive()
    assert caplog.text.count("cannot be renewed") == 1
    before = held(folder)
    assert before is not None
    time.sleep(4 * BEAT_S)
    assert (after := held(folder)) is not None
    assert after.counter > before.counter


def test_leftovers_of_heartbeats_are_removed(folder: Location, taken: list[Lease]) -> None:
    write_file(folder, "_tmp._lease.json.0123", b"half")
    taken.append(Lease.take(folder))
    names = [info.base_name for info in folder.filesystem.get_file_info(pafs.FileSelector(folder.path))]
    assert "_tmp._lease.json.0123" not in names


RIVALS = 8
RIVAL = """
import sys
from ray_ministral.data import lease as lease_module
from ray_ministral.data.files import locate
from ray_ministral.errors import ConfigError
if sys.argv[2] == "no locks":
    lease_module._flock = lambda descriptor: False
print("ready", flush=True)
sys.stdin.readline()  # all at once
try:
    lease = lease_module.Lease.take(locate(sys.argv[1]))
except ConfigError:
    print("refused", flush=True)
else:
    print("taken", flush=True)
    sys.stdin.readline()
    lease.check()
    lease.release()
"""


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(("stale", "locks"), [(False, "locks"), (False, "no locks"), (True, "locks")])
def test_of_many_that_start_at_once_one_wins(tmp_path: Path, stale: bool, locks: str) -> None:
    command = [sys.executable, "-c", RIVAL, str(tmp_path / "out"), locks]
    (tmp_path / "out").mkdir()
    pipe = subprocess.PIPE
    for _ in range(3):
        if stale:
            put(locate(str(tmp_path / "out")), replace(Holder.this_process(60.0), process_start="1"))
        rivals = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for _ in range(RIVALS)]
        try:
            assert [line_of(rival) for rival in rivals] == ["ready"] * RIVALS
            for rival in rivals:
                assert rival.stdin is not None
                rival.stdin.write("\n")
                rival.stdin.flush()
            said = [line_of(rival) for rival in rivals]
            assert sorted(said) == ["refused"] * (RIVALS - 1) + ["taken"]
        finally:
            for rival in rivals:
                rival.communicate("\n", timeout=30)
        assert [rival.returncode for rival in rivals] == [0] * RIVALS, "the winner still holds it at the end"
        assert not (tmp_path / "out" / LEASE_FILE).exists()


def test_the_heartbeat_does_not_keep_the_process(tmp_path: Path) -> None:
    program = "import sys; from ray_ministral.data.lease import Lease; from ray_ministral.data.files import locate; "
    program += "lease = Lease.take(locate(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, timeout=30, check=True)
    content = json.loads((tmp_path / LEASE_FILE).read_text())
    assert content["pid"] != os.getpid()
    Lease.take(locate(str(tmp_path))).release()


def test_a_hidden_process_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc can be mounted so that other people's processes are not seen."""
    holder = Holder.this_process(1.0)
    monkeypatch.setattr(holder_module, "_process", lambda pid: ("", ""))
    assert holder.state() == "unknown"

    def fate(error: type[OSError]) -> Callable[[int, int], None]:
        def kill(pid: int, number: int) -> None:
            assert number == 0
            raise error

        return kill

    monkeypatch.setattr(os, "kill", fate(PermissionError))
    assert holder.state() == "unknown"
    monkeypatch.setattr(os, "kill", fate(ProcessLookupError))
    assert holder.state() == "gone"


def test_without_locks_a_lease_is_created_once(tmp_path: Path) -> None:
    """Two that have both seen that there is none."""
    folder = locate(str(tmp_path))
    first, second = elsewhere(run="first"), elsewhere(run="second")
    assert lease_module._create(folder, first.to_bytes())
    assert not lease_module._create(folder, second.to_bytes())
    assert held(folder) == first
