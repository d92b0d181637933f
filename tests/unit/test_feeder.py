"""`Feeder` with a stand-in for Ray: every row once and in order, whatever dies whenever."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import NodeDiedError, RayError, RayTaskError, WorkerCrashedError

from ray_ministral.captioning.request import Began, PreparedChunk, PreparedRow
from ray_ministral.data.shards import Shard
from ray_ministral.driver import feeder as feeder_module
from ray_ministral.driver.feeder import MAX_STILLBORN, Feeder, Prepared
from ray_ministral.errors import ClusterError, InputError

DEADLINE_S = 60.0


@dataclass(eq=False)
class Reference:
    value: Any

    def future(self) -> Future[Any]:
        """Never done here: a task's end is noted by Ray."""
        return Future()


@dataclass(eq=False)
class Generator:
    """A stream of references, as Ray's: where the task has failed, the last one holds the error."""

    values: Iterator[Any]
    end: Reference = field(default_factory=lambda: Reference(None))
    cancelled: bool = False
    killed: bool = False

    def __next__(self) -> Reference:
        if self.end.value is not None:
            raise StopIteration
        try:
            return Reference(next(self.values))
        except StopIteration:
            raise
        except (WorkerCrashedError, NodeDiedError) as error:
            self.end.value = error
        except Exception as error:  # noqa: BLE001 this is what Ray does
            self.end.value = RayTaskError("prepare", "", error)
        return self.end

    def completed(self) -> Reference:
        return self.end


class FakeRay:
    """What the feeder uses of the module `ray`; everything is ready at once."""

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return references, []

    def get(self, reference: Reference, timeout: float | None = None) -> Any:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def cancel(self, generator: Generator, *, force: bool) -> None:
        generator.cancelled = True
        generator.killed = force


@dataclass
class Workers:
    """Prepares chunks of `chunk_rows` rows; dies at `deadly` rows, and when `luck` has it so, then of `death`."""

    chunk_rows: int = 16
    deadly: frozenset[tuple[int, int]] = frozenset()
    luck: Iterator[bool] = field(default_factory=lambda: iter(()))
    stillborn: Iterator[bool] = field(default_factory=lambda: iter(()))
    error: Exception | None = None
    death: RayError = field(default_factory=WorkerCrashedError)
    started: list[list[Shard]] = field(default_factory=list)
    generators: list[Generator] = field(default_factory=list)

    def start(self, shards: Sequence[Shard]) -> Generator:
        self.started.append(list(shards))
        self.generators.append(Generator(self._stream(list(shards))))
        return self.generators[-1]

    def _stream(self, shards: list[Shard]) -> Iterator[Any]:
        if next(self.stillborn, False):
            raise self.death
        yield Began(0.0)
        for index in dict.fromkeys(shard.index for shard in shards):
            rows = [row for shard in shards if shard.index == index for row in range(shard.start, shard.stop)]
            for at in range(0, len(rows), self.chunk_rows):
                chunk = rows[at : at + self.chunk_rows]
                if self.error is not None:
                    raise self.error
                if any((index, row) in self.deadly for row in chunk):
                    raise WorkerCrashedError
                self._maybe_die()
                ids = np.zeros(1, np.int32)
                yield PreparedChunk(index, tuple(PreparedRow(row, ids, (), None) for row in chunk), 1)
                self._maybe_die()
                yield f"pixels of {index}: {chunk}"
        self._maybe_die()

    def _maybe_die(self) -> None:
        if next(self.luck, False):
            raise self.death


@pytest.fixture(autouse=True)
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder_module, "ray", FakeRay())


def shard(index: int, group: int, start: int, stop: int) -> Shard:
    return Shard(index, "a.parquet", 0, group, start, stop, "/a.parquet")


def take_all(feeder: Feeder) -> list[Prepared]:
    taken = []
    while not feeder.exhausted:
        prepared = feeder.take()
        if prepared is not None:
            taken.append(prepared)
    return taken


def keys(taken: list[Prepared], *, failed: bool | None = None) -> list[tuple[int, int]]:
    return [
        (prepared.chunk.shard_index, row.row)
        for prepared in taken
        for row in prepared.chunk.rows
        if failed is None or (row.failure is not None) == failed
    ]


def all_keys(shards: Sequence[Shard]) -> list[tuple[int, int]]:
    return [(piece.index, row) for piece in shards for row in range(piece.start, piece.stop)]


WHOLE = [shard(0, 0, 0, 40), shard(1, 0, 40, 50), shard(2, 1, 0, 7), shard(3, 1, 7, 90), shard(4, 2, 0, 1)]
SINGLES = [shard(0, 0, row, row + 1) for row in (2, 3, 7, 21)] + [shard(1, 0, row, row + 1) for row in (40, 44)]


@pytest.mark.parametrize("shards", [WHOLE, SINGLES], ids=["whole", "singles"])
def test_rows_come_once_in_order_with_their_pixels(shards: list[Shard]) -> None:
    workers = Workers(chunk_rows=3)
    taken = take_all(Feeder(shards, workers.start))
    assert keys(taken) == all_keys(shards)
    for prepared in taken:
        chunk = prepared.chunk
        value = prepared.pixels.value
        assert value == f"pixels of {chunk.shard_index}: {[row.row for row in chunk.rows]}"
    groups = list(dict.fromkeys(piece.row_group for piece in shards))
    assert [unit[0].row_group for unit in workers.started] == groups, "a row group is read once"


@pytest.mark.parametrize("shards", [WHOLE, SINGLES], ids=["whole", "singles"])
@pytest.mark.parametrize("seed", range(60))
def test_whatever_dies_rows_come_once_and_only_those_at_fault_fail(shards: list[Shard], seed: int) -> None:
    rng = random.Random(seed)
    deadly: frozenset[tuple[int, int]] = frozenset()
    luck: Iterator[bool] = iter(())
    if seed % 2:
        deadly = frozenset(rng.sample(all_keys(shards), rng.randint(1, 3)))
    else:
        # One worker dies for no reason of a row's own: between a chunk and its pixels, at the end, anywhere.
        when = rng.randrange(20)
        luck = iter([index == when for index in range(20)])
    workers = Workers(rng.randint(1, 16), deadly, luck)
    taken = take_all(Feeder(shards, workers.start))
    assert keys(taken) == all_keys(shards)
    assert set(keys(taken, failed=True)) == deadly


@pytest.mark.parametrize("when", range(6))
def test_a_node_that_dies_is_held_against_no_row(when: int) -> None:
    """Its rows are prepared again together: one by one each would want a process of its own."""
    luck = iter([index == when for index in range(20)])
    workers = Workers(4, luck=luck, death=NodeDiedError("its raylet is gone"))
    taken = take_all(Feeder(WHOLE, workers.start))
    assert keys(taken) == all_keys(WHOLE)
    assert not failures(taken)
    whole = len(Workers(4).started) + len({(one.file_index, one.row_group) for one in WHOLE})
    assert len(workers.started) <= whole + 2, "the rest of one, and the one that was begun behind it"


@pytest.mark.parametrize("taken_before", range(4))
def test_what_is_under_way_is_begun_again_where_it_is(taken_before: int) -> None:
    workers = Workers(4)
    feeder = Feeder(WHOLE, workers.start)
    taken = [prepared for prepared in (feeder.take() for _ in range(taken_before)) if prepared is not None]
    before = list(workers.generators)
    feeder.begin_again()
    assert sum(generator.killed for generator in before) >= 1
    assert keys([*taken, *take_all(feeder)]) == all_keys(WHOLE)


def test_rows_that_are_wanted_again_come_in_one_unit_a_row_group() -> None:
    workers = Workers()
    feeder = Feeder([], workers.start)
    wanted = [replace(shard(0, 0, 0, 40), start=row, stop=row + 1) for row in (7, 3, 4)]
    feeder.again([*wanted, replace(shard(1, 1, 0, 9), start=2, stop=3)])
    assert [[(s.index, s.start) for s in unit] for unit in workers.started] == [[(0, 3), (0, 4), (0, 7)], [(1, 2)]]
    assert keys(take_all(feeder)) == [(0, 3), (0, 4), (0, 7), (1, 2)]


def test_after_a_death_only_rows_of_the_chunk_under_way_stand_alone() -> None:
    workers = Workers(deadly=frozenset({(0, 500)}))
    taken = take_all(Feeder([shard(0, 0, 0, 10_000)], workers.start))
    assert keys(taken) == all_keys([shard(0, 0, 0, 10_000)])
    assert keys(taken, failed=True) == [(0, 500)]
    (bad,) = [row for prepared in taken for row in prepared.chunk.rows if row.failure is not None]
    assert bad.failure is not None
    assert bad.failure.status == "engine_error"
    assert "died" in bad.failure.error
    # The whole, sixteen rows alone, and the others together; the bad row again, and the one that was begun behind it.
    assert len(workers.started) == 1 + 16 + 1 + 2


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (InputError("a.parquet is damaged"), InputError, "^a.parquet is damaged$"),
        (KeyError("a bug"), ClusterError, "rows of a.parquet cannot be prepared: KeyError: 'a bug'"),
    ],
)
def test_what_is_wrong_with_a_file_is_raised(error: Exception, raised: type[Exception], words: str) -> None:
    feeder = Feeder(WHOLE, Workers(error=error).start)
    with pytest.raises(raised, match=words):
        take_all(feeder)


def test_only_so_many_units_are_under_way_and_close_stops_them() -> None:
    workers = Workers()
    shards = [shard(index, index, 0, 5) for index in range(10)]
    feeder = Feeder(shards, workers.start, units_ahead=3)
    assert len(workers.started) == 3
    assert feeder.waitable() is not None
    feeder.take()
    feeder.close()
    assert feeder.waitable() is None


@pytest.mark.parametrize("times", [1, 3])
def test_a_chunk_that_was_looked_at_is_taken_all_the_same(times: int) -> None:
    feeder = Feeder(WHOLE, Workers(chunk_rows=3).start)
    looked = [feeder.peek(1.0) for _ in range(times)]
    assert looked[0] is not None
    assert looked == looked[:1] * times
    taken = take_all(feeder)
    assert taken[0] is looked[0]
    assert keys(taken) == all_keys(WHOLE)
    assert feeder.peek(1.0) is None, "there is no more"


def test_the_only_chunk_is_not_forgotten_once_it_was_looked_at() -> None:
    feeder = Feeder([shard(0, 0, 0, 2)], Workers().start)
    assert feeder.peek(1.0) is not None
    assert not feeder.exhausted
    assert keys(take_all(feeder)) == [(0, 0), (0, 1)]


def test_looking_waits_no_longer_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Slow(FakeRay):
        def wait(self, references: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
            waits.append(options["timeout"])
            return [], references

    monkeypatch.setattr(feeder_module, "ray", Slow())
    monkeypatch.setattr(feeder_module, "time", Ticking())
    assert Feeder(WHOLE, Workers().start).peek(3.0) is None
    assert max(waits) <= 3.0


class Ticking:
    """A clock on which every look takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now

    time = monotonic


@pytest.mark.parametrize(("seconds", "words"), [(59.0, "died"), (60.5, "took longer than its deadline of 60 s")])
def test_a_row_that_had_its_time_is_told_from_one_that_crashed(
    monkeypatch: pytest.MonkeyPatch, seconds: float, words: str
) -> None:
    monkeypatch.setattr(feeder_module._Life, "seconds", seconds)
    taken = take_all(Feeder(WHOLE, Workers(deadly=frozenset({(2, 3)})).start, DEADLINE_S))
    assert keys(taken) == all_keys(WHOLE)
    assert [row.row for row in failures(taken)] == [3]
    assert words in str(failures(taken)[0].failure)


def failures(taken: list[Prepared]) -> list[PreparedRow]:
    return [row for prepared in taken for row in prepared.chunk.rows if row.failure is not None]


def test_the_time_of_a_worker_is_taken_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder_module, "time", Ticking())
    generator = Generator(iter(()))
    end: Future[Any] = Future()
    generator.end.future = lambda: end  # type: ignore[method-assign]
    life = feeder_module._Life(generator)
    assert life.seconds == 0.0, "it has not begun"
    life.began = 0.5
    assert (life.seconds, life.seconds) == (0.5, 1.5), "it goes on"
    end.set_exception(WorkerCrashedError())
    assert (life.seconds, life.seconds) == (2.5, 2.5)


def test_a_worker_that_dies_before_it_begins_is_no_rows_fault() -> None:
    workers = Workers(stillborn=iter([True] * MAX_STILLBORN))
    taken = take_all(Feeder([shard(0, 0, 0, 1)], workers.start))
    assert keys(taken) == [(0, 0)]
    assert not failures(taken)
    assert len(workers.started) == MAX_STILLBORN + 1


def test_workers_that_never_begin_end_the_job() -> None:
    feeder = Feeder(WHOLE, Workers(stillborn=iter([True] * 1000)).start)
    with pytest.raises(ClusterError, match=f"{MAX_STILLBORN + 1} workers .* before they began"):
        take_all(feeder)


class Silent(FakeRay):
    """A Ray in which some generators have nothing to give: their workers were stopped after so many references."""

    def __init__(self) -> None:
        self.given: dict[int, int] = {}

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        ready = [generator for generator in references if self.given.get(id(generator), 1) > 0]
        for generator in ready:
            if id(generator) in self.given:
                self.given[id(generator)] -= 1
        return ready, [generator for generator in references if generator not in ready]


@pytest.mark.parametrize("after", range(6), ids="after {} references".format)
def test_a_worker_that_says_nothing_is_given_up_and_its_rows_are_prepared_again(
    monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    ray = Silent()
    monkeypatch.setattr(feeder_module, "ray", ray)
    workers = Workers(chunk_rows=4)
    feeder = Feeder(WHOLE, workers.start)
    stopped, later = workers.generators
    ray.given[id(stopped)] = after
    taken = []
    while (prepared := feeder.take()) is not None:
        taken.append(prepared)
    assert len(taken) == max(0, after - 1) // 2, "a chunk whose pixels never come stops nobody"  # `Began` comes first
    assert feeder.restart_stuck(600.0)
    assert stopped.killed
    assert later.killed, "it may be stopped just as well"
    taken += take_all(feeder)
    assert keys(taken) == all_keys(WHOLE)
    assert not failures(taken)


def test_a_row_at_which_every_worker_is_stuck_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Silent()
    monkeypatch.setattr(feeder_module, "ray", ray)
    workers = Workers()
    feeder = Feeder([shard(0, 0, 0, 40)], workers.start)
    taken = []
    while not feeder.exhausted:
        for generator, shards in zip(workers.generators, workers.started, strict=True):
            if shards[0].start <= 5 < shards[0].stop:
                ray.given.setdefault(id(generator), 1)  # it says that it begins, and no more
        prepared = feeder.take()
        if prepared is not None:
            taken.append(prepared)
        elif not feeder.exhausted:
            assert feeder.restart_stuck(600.0)
    assert keys(taken) == all_keys([shard(0, 0, 0, 40)])
    assert [row.row for row in failures(taken)] == [5]
    assert "said nothing for 600 s and was given up" in str(failures(taken)[0].failure)


def test_silence_that_is_not_a_workers_fault_changes_nothing() -> None:
    workers = Workers()
    feeder = Feeder(WHOLE, workers.start)
    assert not feeder.restart_stuck(600.0), "the next chunk is there: somebody else is stuck"
    assert keys(take_all(feeder)) == all_keys(WHOLE)
    assert not feeder.restart_stuck(600.0), "there is nothing to come"
    assert not any(generator.killed for generator in workers.generators)
