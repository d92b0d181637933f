"""The policies, as tables."""

from __future__ import annotations

import pytest

from ray_ministral.driver.policies import PATIENCE, Death, Decision, FailurePolicy, too_many_errors

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
