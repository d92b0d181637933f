"""`PartTracker`: a shard is whole when every row has its result, and what is counted adds up."""

from __future__ import annotations

import random

import pytest

from ray_ministral.captioning.request import RowFailure, RowResult
from ray_ministral.data.parts import PartInfo
from ray_ministral.data.shards import Shard
from ray_ministral.driver.parts import PartTracker, Totals


def shard(index: int, start: int, stop: int, group: int = 0) -> Shard:
    return Shard(index, "a.parquet", 0, group, start, stop, "/a.parquet")


def good(row: int, tokens: int = 3) -> RowResult:
    return RowResult(row, "a picture", "ok", None, None, "stop", 5, 2, tokens, 1, None)


def bad(row: int, status: str = "bad_image") -> RowResult:
    return RowResult.failed(row, RowFailure(status, "broken", "decode"))


def part(piece: Shard, **counts: int) -> PartInfo:
    return PartInfo(piece.part_name, sum(counts.values()), counts, 100)


SHARDS = [shard(0, 0, 4), shard(1, 4, 6), shard(2, 0, 3, group=1)]


def test_a_shard_is_given_out_once_when_its_last_row_has_come() -> None:
    tracker = PartTracker(SHARDS, {}, {})
    assert list(tracker.wanted()) == SHARDS
    waiting = {piece.index: set(range(piece.start, piece.stop)) for piece in SHARDS}
    rows = [(index, row) for index, rows in waiting.items() for row in rows]
    random.Random(0).shuffle(rows)
    for index, row in rows:
        waiting[index].discard(row)
        results = tracker.add(index, good(row), images=1)
        assert (results is not None) == (not waiting[index])
        if results is not None:
            assert not tracker.done
            assert sorted(result.row for result in results) == list(range(SHARDS[index].start, SHARDS[index].stop))
            tracker.committed(index, part(SHARDS[index], ok=SHARDS[index].rows))
    assert tracker.done
    assert tracker.totals == Totals(rows=9, errors=0, images=9, tokens=27)
    assert tracker.status_counts == {"ok": 9}


def test_committed_parts_are_not_wanted_again_and_their_errors_count() -> None:
    committed = {SHARDS[0].part_name: part(SHARDS[0], ok=3, bad_image=1)}
    tracker = PartTracker(SHARDS, committed, {})
    assert list(tracker.wanted()) == SHARDS[1:]
    assert tracker.done_before == 4
    assert tracker.errors == 1
    tracker.add(1, bad(4), images=0)
    assert tracker.errors == 2
    assert tracker.totals == Totals(rows=1, errors=1)


def test_of_a_part_with_failures_only_these_rows_are_wanted() -> None:
    committed = {piece.part_name: part(piece, ok=piece.rows) for piece in SHARDS[1:]}
    committed[SHARDS[0].part_name] = part(SHARDS[0], ok=2, bad_image=1, engine_error=1)
    tracker = PartTracker(SHARDS, committed, {0: (1, 3)})
    assert [(piece.index, piece.start, piece.stop) for piece in tracker.wanted()] == [(0, 1, 2), (0, 3, 4)]
    assert tracker.done_before == 7
    assert tracker.errors == 0, "they have yet to fail again"
    assert tracker.add(0, good(3), images=1) is None
    results = tracker.add(0, bad(1), images=0)
    assert results is not None
    assert {result.row for result in results} == {1, 3}
    tracker.committed(0, part(SHARDS[0], ok=3, bad_image=1))
    assert tracker.done
    assert tracker.errors == 1
    assert tracker.status_counts == {"bad_image": 1, "ok": 8}


@pytest.mark.parametrize("committed", [True, False])
def test_a_job_without_anything_to_do_is_done(committed: bool) -> None:
    infos = {piece.part_name: part(piece, ok=piece.rows) for piece in SHARDS}
    assert PartTracker(SHARDS, infos if committed else {}, {}).done is committed
