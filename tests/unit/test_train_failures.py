"""Which failures of a training run end it."""

from __future__ import annotations

import pytest

from ray_ministral.driver.train_failures import Failures
from ray_ministral.errors import ClusterError, OutputError, PlacementError, StageDiedError


def test_failures_are_counted_until_a_step_is_done() -> None:
    failures = Failures(max_restarts=1)
    failures.note(StageDiedError("one"))
    failures.step_done()
    failures.note(ClusterError("two"))
    assert failures.recoveries == 2
    failures.note(StageDiedError("three"))
    with pytest.raises(StageDiedError, match=r"four; given up after 4 failures, the last 2 of them without a step"):
        failures.note(StageDiedError("four"))


def test_a_failure_in_a_recovery_is_no_recovery_of_its_own() -> None:
    failures = Failures(max_restarts=3)
    failures.note(StageDiedError("one"))
    failures.note(StageDiedError("two"))
    assert failures.recoveries == 1
    assert failures.seconds == 0
    failures.step_done()
    assert failures.seconds > 0


@pytest.mark.parametrize("kind", [PlacementError, OutputError])
def test_what_no_other_stage_can_mend_ends_the_run(kind: type[ClusterError]) -> None:
    with pytest.raises(kind, match=r"^full$"):
        Failures(max_restarts=3).note(kind("full"))
