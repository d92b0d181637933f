"""Parts on their way out: a few are written at a time, none is lost, and whoever is full says so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ray_ministral.data.parts import Attempt, PartInfo
from ray_ministral.driver import part_writer as module
from ray_ministral.driver.part_writer import PARTS_AHEAD, WRITES_AT_ONCE, PartWriter
from ray_ministral.driver.trace import Trace
from ray_ministral.errors import OutputError

PARTS = 40


class Ledger:
    """Takes attempts, after `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.commits: list[tuple[str, int]] = []
        self.lease = SimpleNamespace(raise_if_lost=lambda: None)
        self.output = "/output"

    def commit(self, attempt: Attempt, *, generation: int) -> PartInfo:
        time.sleep(self.seconds)
        self.commits.append((attempt.info.name, generation))
        return attempt.info


class Tasks:
    """Stands for Ray and for its tasks that write: a reference is a number, and is ready at once."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.write = self

    def remote(self, shard: Any, *_: Any, **__: Any) -> int:
        self.started.append(shard.part_name)
        return len(self.started) - 1

    def get(self, reference: int) -> Attempt:
        name = self.started[reference]
        return Attempt(info_of(name), f"_tmp-{name}", "0" * 64)

    def wait(self, references: list[int], **_: Any) -> tuple[list[int], list[int]]:
        return references[:1], references[1:]


def info_of(name: str) -> PartInfo:
    return PartInfo(name, 1, {"ok": 1}, 10)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Tasks:
    tasks = Tasks()
    monkeypatch.setattr(module, "tasks", tasks)
    monkeypatch.setattr(module, "ray", tasks)
    return tasks


def name_of(index: int) -> str:
    return f"part-{index}"


def make_writer(ledger: Ledger) -> PartWriter:
    shards = [SimpleNamespace(part_name=name_of(index)) for index in range(PARTS)]
    plan = SimpleNamespace(shards=shards, carried_columns=())
    job: Any = SimpleNamespace(ledger=ledger, plan=plan, failed_rows={})
    return PartWriter(job, Trace(None), with_token_ids=False)


def commits_of(writer: PartWriter) -> Iterator[int]:
    while not writer.is_idle:
        for reference in list(writer.waitables):
            writer.written(reference)
        writer.wait_for_commit(5.0)
        yield from (commit.shard_index for commit in writer.committed())


def test_a_few_parts_are_written_at_a_time_and_all_in_the_end(tasks: Tasks) -> None:
    ledger = Ledger()
    with make_writer(ledger) as writer:
        assert writer.is_idle
        for index in range(PARTS):
            writer.write(index, [], generation=index)
            assert writer.is_full == (index + 1 >= PARTS_AHEAD)
        assert tasks.started == [name_of(index) for index in range(WRITES_AT_ONCE)]
        assert len(writer.under_way) == PARTS
        assert sorted(commits_of(writer)) == list(range(PARTS))
        assert not writer.is_full
    assert [name for name, _ in ledger.commits] == [name_of(index) for index in range(PARTS)]
    assert {generation for _, generation in ledger.commits} == {PARTS - 1}, "the newest that is known"


def test_a_slow_commit_fills_the_writer_and_makes_room_again(tasks: Tasks) -> None:
    with make_writer(Ledger(seconds=0.02)) as writer:
        for index in range(PARTS_AHEAD):
            writer.write(index, [], generation=0)
        for reference in list(writer.waitables):
            writer.written(reference)
        assert writer.is_full, "what is written and not committed counts"
        assert len(list(commits_of(writer))) == PARTS_AHEAD
        assert not writer.is_full


def leave_with(error: BaseException, ledger: Ledger, parts: int) -> None:
    with make_writer(ledger) as writer:
        for index in range(parts):
            writer.write(index, [], generation=0)
        raise error


def test_what_is_whole_is_committed_before_leaving(tasks: Tasks) -> None:
    ledger = Ledger()
    with pytest.raises(KeyboardInterrupt):
        leave_with(KeyboardInterrupt(), ledger, parts=10)
    assert len(ledger.commits) == 10
    assert len(tasks.started) == 10


def test_a_full_disk_is_not_tried_again_on_the_way_out(tasks: Tasks) -> None:
    ledger = Ledger()
    with pytest.raises(OutputError):
        leave_with(OutputError("no space left"), ledger, parts=1)
    assert ledger.commits == []
