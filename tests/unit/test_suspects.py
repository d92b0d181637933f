"""Rows that break a step or kill a stage each time: they alone are given up, after few failures; the others finish."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from ray_ministral.captioning.batching import BatchScheduler, Launch, Request
from ray_ministral.captioning.suspects import Suspects, Verdict

NEW = 5


class World:
    """A replica whose stages die, or whose steps fail, where certain rows are fed. Deaths also come from outside."""

    def __init__(self, rows: int, bad: set[int], *, deadly: bool, prefill_only: bool, death_rate: float = 0.0) -> None:
        self.scheduler = BatchScheduler(
            microbatches=3,
            rows_per_microbatch=32,
            kv_tokens_per_microbatch=8192,
            tokens_per_step=80,
            finish_check=lambda _: None,
        )
        self.requests = [Request(key, np.arange(10, dtype=np.int32), NEW, sample_key=key) for key in range(rows)]
        for request in self.requests:
            self.scheduler.add(request)
        self.bad, self.deadly, self.prefill_only, self.death_rate = bad, deadly, prefill_only, death_rate
        self.suspects = Suspects()
        self.failures = self.outside = 0
        self.done: list[int] = []
        self.given_up: list[int] = []

    def run(self, seed: int = 0) -> None:
        chance = random.Random(seed)
        flying: list[Launch] = []
        while not self.scheduler.idle:
            flying += self.scheduler.launches()
            launch = flying.pop(chance.randrange(len(flying)))
            from_outside = chance.random() < self.death_rate
            if self._is_bad(launch) or from_outside:
                self.outside += from_outside
                self.failures += 1
                if self.deadly or from_outside:
                    flying = []
                    self._take(self.suspects.after_death(*self.scheduler.reset(self.failures)))
                else:
                    self._take(self.suspects.after_error(self.scheduler.fail(launch.plan)))
                assert self.failures < 10_000
                continue
            tokens = np.full(len(launch.plan.sample_keys), 7, dtype=np.int32)
            self.done += [finished.request.key for finished in self.scheduler.complete(launch.plan, tokens)]

    def _is_bad(self, launch: Launch) -> bool:
        first = launch.plan.num_decode if self.prefill_only else 0
        return bool(self.bad.intersection(launch.plan.sample_keys[first:].tolist()))

    def _take(self, verdict: Verdict) -> None:
        self.scheduler.add_first(verdict.again)
        self.given_up += [request.key for request in verdict.given_up]


@pytest.mark.parametrize("prefill_only", [True, False], ids=["prefill", "any step"])
@pytest.mark.parametrize("deadly", [True, False], ids=["deadly", "error"])
@pytest.mark.parametrize("bad", [set(), {0}, {77}, {3, 4}, {1, 50, 99}], ids=str)
def test_the_bad_rows_alone_are_given_up(bad: set[int], deadly: bool, prefill_only: bool) -> None:
    world = World(100, bad, deadly=deadly, prefill_only=prefill_only)
    world.run()
    assert set(world.given_up) == bad
    assert sorted(world.done) == sorted(set(range(100)) - bad)
    each = math.log2(96) + 6
    assert world.failures <= len(bad) * each
    good = [request for request in world.requests if request.key not in bad]
    assert all(request.generated == [7] * NEW for request in good)


def test_a_single_death_is_held_against_nobody() -> None:
    suspects = Suspects()
    rows = [Request(key, np.arange(3, dtype=np.int32), 2, sample_key=key) for key in range(4)]
    verdict = suspects.after_death(rows[:3], rows[3:])
    assert verdict.again == rows
    assert not verdict.given_up
    assert not verdict.narrowed
    assert [row.group for row in rows] == [None] * 4
    assert [row.attempts for row in rows] == [2, 2, 2, 1]


@pytest.mark.parametrize("seed", range(20))
def test_deaths_from_outside_condemn_no_good_row(seed: int) -> None:
    """A stage dies in one of twenty-five steps, for no reason that has to do with rows."""
    world = World(800, {150}, deadly=True, prefill_only=True, death_rate=0.04)
    world.run(seed)
    assert world.outside > 2
    assert world.given_up == [150]
    assert len(world.done) == 799


def test_a_row_alone_that_fails_is_tried_once_more() -> None:
    suspects = Suspects()
    row = Request(0, np.arange(3, dtype=np.int32), 2, sample_key=0)
    first = suspects.after_error([row])
    assert first.again == [row]
    assert row.attempts == 2
    assert row.group is not None
    second = suspects.after_error([row])
    assert (second.again, second.given_up) == ([], [row])
