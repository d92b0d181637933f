"""The policies, as tables."""

from __future__ import annotations

import pytest

from ray_ministral.driver.policies import (
    PATIENCE,
    Death,
    Decision,
    FailurePolicy,
    keep_waiting,
    threads_for,
    too_many_errors,
)

VAIN = Death("x", rows=0)
NARROWED = Death("x", rows=0, narrowed=True)
FRUITFUL = Death("x", rows=5)


@pytest.mark.parametrize(
    ("deaths", "decision"),
    [
        ([VAIN], Decision.REPLACE),
        ([VAIN] * 3, Decision.REPLACE),
        ([VAIN] * 4, Decision.GIVE_UP),
        ([FRUITFUL, *[VAIN] * 3], Decision.REPLACE),
        ([*[VAIN] * 3, FRUITFUL], Decision.REPLACE),
        ([FRUITFUL] * 1000, Decision.REPLACE),
        ([VAIN, NARROWED] * 3, Decision.REPLACE),
        ([*[NARROWED] * 9, VAIN, VAIN, VAIN], Decision.REPLACE),
        ([NARROWED] * (3 * PATIENCE), Decision.REPLACE),
        ([NARROWED] * (3 * PATIENCE + 1), Decision.GIVE_UP),
        ([FRUITFUL, *[NARROWED] * (3 * PATIENCE)], Decision.REPLACE),
    ],
)
def test_restarts_that_bring_nothing_are_limited(deaths: list[Death], decision: Decision) -> None:
    assert FailurePolicy(3).decide(deaths) is decision


def test_no_restart_at_all() -> None:
    assert FailurePolicy(0).decide([VAIN]) is Decision.GIVE_UP
    assert FailurePolicy(0).decide([FRUITFUL]) is Decision.REPLACE


@pytest.mark.parametrize(
    ("errors", "done", "rows", "rate", "expected"),
    [
        (3, 45, 45, 0.05, True),
        (2, 45, 45, 0.05, False),
        (3, 3, 45, 0.05, True),  # it cannot get better
        (499, 499, 10_000_000, 0.01, False),  # it may have begun with all of the bad ones
        (500, 500, 10_000_000, 0.01, True),
        (500, 500, 10_000_000, 1.0, False),
        (30, 1000, 10_000_000, 0.02, False),  # 3 % of 1000 may be chance
        (45, 1000, 10_000_000, 0.02, True),
        (300, 10_000, 10_000_000, 0.02, True),
        (1, 500, 10_000_000, 0.0, True),
        (0, 500, 10_000_000, 0.0, False),
        (99, 10_000, 10_000, 0.01, False),
    ],
)
def test_too_many_errors(errors: int, done: int, rows: int, rate: float, expected: bool) -> None:
    assert too_many_errors(errors, done, rows, rate) is expected


@pytest.mark.parametrize(
    ("stages", "cpus", "threads"),
    [
        (1, [8], 8),
        (2, [8], 4),
        (3, [8], 2),
        (1, [2, 2, 2, 2], 2),  # a stage lies on one node
        (2, [2, 2, 2], 2),
        (4, [3, 3, 3], 1),  # two of two threads would not fit on any
        (3, [4, 3], 2),
        (2, [8, 1], 4),
        (16, [8], 1),  # no room at all: said where it is asked for
        (2, [0], 1),
        (2, [], 1),
        (1, [0.5, 2.5], 2),
    ],
)
def test_threads_of_a_stage_are_on_one_node(stages: int, cpus: list[float], threads: int) -> None:
    assert threads_for(stages, cpus) == threads


@pytest.mark.parametrize(
    ("waited", "since_coming", "goes_on"),
    [
        (0, 0, True),
        (600, 600, True),
        (601, 601, False),  # nothing ever came
        (1000, 0, True),  # a node is on its way
        (1000, 599, True),  # and was, not long ago: it may be the one that is installed now
        (1000, 601, False),
        (3601, 0, False),  # one fails to start again and again
    ],
)
def test_waiting_for_room_ends(waited: float, since_coming: float, goes_on: bool) -> None:
    assert keep_waiting(waited, since_coming, timeout_s=600, nodes_timeout_s=3600) is goes_on


def test_a_long_time_out_is_kept() -> None:
    assert keep_waiting(5000, 5000, timeout_s=7200, nodes_timeout_s=3600)
