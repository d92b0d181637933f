"""The schedule of a step by what earlier steps took."""

from __future__ import annotations

from collections import Counter

from ray_ministral.pipeline.schedule import COMPUTE, Schedule
from ray_ministral.pipeline.schedule_check import check
from ray_ministral.pipeline.simulator import Durations, Span, simulate
from ray_ministral.training.durations import ScheduleMaker

UNEVEN = Durations.per_chunk((11.0, 9.0), (20.0, 17.0), (9.0, 8.0))


def spans(schedule: Schedule, durations: Durations) -> list[list[Span]]:
    """As stages that take these durations would report them."""
    return [list(row) for row in simulate(schedule, durations).spans]


def test_uneven_stages_get_another_zero_bubble_schedule() -> None:
    maker = ScheduleMaker("zero-bubble", 2, (True, True))
    before = maker.schedule(8)
    for _ in range(2):
        maker.observe(spans(before, UNEVEN))
    after = maker.schedule(8)
    check(after)
    assert simulate(after, UNEVEN).step_seconds < simulate(before, UNEVEN).step_seconds
    # the slow stage never waits, but at the end of the step
    assert simulate(after, UNEVEN).bubbles[0] < 0.02
    for old, new in zip(before.actions, after.actions, strict=True):
        assert Counter(a for a in old if a.kind in COMPUTE) == Counter(a for a in new if a.kind in COMPUTE)


def test_the_first_step_says_nothing() -> None:
    maker = ScheduleMaker("zero-bubble", 2, (True, True))
    before = maker.schedule(8)
    maker.observe(spans(before, UNEVEN))
    assert maker.schedule(8) is before


def test_other_schedules_stay() -> None:
    maker = ScheduleMaker("1f1b", 2, (True, True))
    before = maker.schedule(8)
    for _ in range(8):
        maker.observe(spans(before, UNEVEN))
    assert maker.schedule(8) is before


def test_frozen_stages_and_few_microbatches() -> None:
    for trainable in ((False, True, True), (True, False, True), (False, False, True)):
        maker = ScheduleMaker("zero-bubble", 3, trainable)
        for microbatches in (1, 2, 5):
            for _ in range(4):
                schedule = maker.schedule(microbatches)
                check(schedule)
                durations = Durations.per_chunk((1.0, 3.0, 2.0), (2.0, 6.0, 4.0), (1.0, 3.0, 2.0))
                maker.observe(spans(schedule, durations))
