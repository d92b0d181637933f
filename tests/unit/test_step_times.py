"""What a stage notes of its steps, and the figures that the summary makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_ministral.captioning.step_times import StageTotals, StepSpan, StepTimes
from ray_ministral.driver.summary import StageFigures

PREFILL = StepSpan(
    step=0,
    microbatch=0,
    started=1000.0,
    seconds=0.5,
    before_seconds=0.0625,
    model_seconds=0.375,
    prefill_tokens=90,
    decode_tokens=0,
    images=3,
)
DECODE = replace(PREFILL, step=1, seconds=0.25, model_seconds=0.125, prefill_tokens=0, decode_tokens=10, images=0)


def test_sums_are_over_all_steps() -> None:
    times = StepTimes(traced=False)
    assert times.totals == StageTotals()
    times.add(PREFILL)
    times.add(DECODE)
    totals = times.totals
    assert totals == StageTotals(2, 0.75, 0.5, 90, 10, 3)
    assert (totals.tokens, totals.outside_seconds) == (100, 0.25)
    assert times.take() == [], "nobody wants single steps"


def test_steps_are_taken_once_in_order_and_stay_in_the_sums() -> None:
    times = StepTimes(traced=True)
    times.add(PREFILL)
    times.add(DECODE)
    assert times.take() == [PREFILL, DECODE]
    times.add(PREFILL)
    assert times.take() == [PREFILL]
    assert times.take() == []
    assert times.totals.steps == 3


def test_what_nobody_takes_is_bounded() -> None:
    times = StepTimes(traced=True, kept=3)
    for step in range(10):
        times.add(replace(DECODE, step=step))
    assert [span.step for span in times.take()] == [7, 8, 9]
    assert times.totals.steps == 10


def test_figures_of_one_replica() -> None:
    stages = [StageTotals(4, 8.0, 6.0, 90, 10, 3), StageTotals(4, 6.0, 5.5, 90, 10, 0)]
    figures = StageFigures.of([stages], 2, 10.0)
    assert figures.stage_busy == [0.8, 0.6]
    assert figures.bubble == pytest.approx(0.3)
    assert (figures.steps, figures.tokens_per_step) == (4, 25.0)
    assert figures.model_seconds == [6.0, 5.5]
    assert figures.outside_seconds == [2.0, 0.5]


def test_figures_of_replicas_are_means_but_all_steps_count() -> None:
    first = [StageTotals(4, 8.0, 6.0, 90, 10, 3), StageTotals(4, 6.0, 5.5, 90, 10, 0)]
    second = [StageTotals(1, 2.0, 1.0, 0, 5, 0), StageTotals(1, 4.0, 3.5, 0, 5, 0)]
    figures = StageFigures.of([first, second], 2, 10.0)
    assert figures.stage_busy == [0.5, 0.5]
    assert figures.bubble == pytest.approx(0.5)
    assert (figures.steps, figures.tokens_per_step) == (5, 21.0)
    assert figures.model_seconds == [3.5, 4.5]
    assert figures.outside_seconds == [1.5, 0.5]


def test_a_run_with_nothing_left_to_do_has_no_bubble() -> None:
    figures = StageFigures.of([], 3, 0.0)
    assert figures == StageFigures([0.0] * 3, 0.0, 0, 0.0, [0.0] * 3, [0.0] * 3)
