"""The simulator against hand-made timelines, the papers' closed forms, and counts of live activations."""

from __future__ import annotations

import random

import pytest

from ray_ministral.pipeline.generators import gpipe, interleaved, make_schedule, one_f_one_b
from ray_ministral.pipeline.schedule import Action, Kind, ScheduleError
from ray_ministral.pipeline.simulator import Durations, Timeline, peak_activations, simulate
from ray_ministral.pipeline.zero_bubble import zero_bubble

SIZES = [(stages, microbatches) for stages in range(1, 7) for microbatches in range(1, 13)]


def spans(timeline: Timeline, stage: int) -> list[tuple[str, float, float]]:
    return [(f"{span.action.kind}{span.action.microbatch}", span.start, span.end) for span in timeline.spans[stage]]


def test_two_stages_by_hand() -> None:
    timeline = simulate(one_f_one_b(2, 2), Durations.uniform(2, forward=2, backward=4, weight=2, transfer=1))
    assert spans(timeline, 0) == [("F0", 0, 2), ("F1", 2, 4), ("B0", 10, 14), ("B1", 16, 20)]
    assert spans(timeline, 1) == [("F0", 3, 5), ("B0", 5, 9), ("F1", 9, 11), ("B1", 11, 15)]
    assert timeline.step_seconds == 20
    assert timeline.busy_seconds == (12, 12)
    assert timeline.bubbles == (pytest.approx(0.4), pytest.approx(0.4))
    assert timeline.bubble == pytest.approx(0.4)
    assert timeline.peak_activations == (2, 1)


def test_handling_keeps_a_stage_busy() -> None:
    timeline = simulate(gpipe(2, 2), Durations.uniform(2, forward=2, backward=4, weight=2, transfer=1, handling=1))
    # F0 0-2, SEND 2-3, F1 3-5, SEND 5-6; the messages are there at 4 and 7, and a RECV takes 1.
    assert spans(timeline, 0)[:2] == [("F0", 0, 2), ("F1", 3, 5)]
    assert spans(timeline, 1) == [("F0", 5, 7), ("F1", 8, 10), ("B0", 10, 14), ("B1", 15, 19)]
    # Sent 14-15, there at 16, received 16-17; then sent 19-20, there at 21, received 21-22.
    assert spans(timeline, 0)[2:] == [("B0", 17, 21), ("B1", 22, 26)]


def test_microbatches_of_unequal_size() -> None:
    even = Durations.uniform(2, forward=1, backward=2, weight=1, transfer=1)
    timeline = simulate(gpipe(2, 2), even.scaled([3, 1]))
    assert spans(timeline, 0)[:2] == [("F0", 0, 3), ("F1", 3, 4)]
    # Three seconds on the way for the large one.
    assert spans(timeline, 1) == [("F0", 6, 9), ("F1", 9, 10), ("B0", 10, 16), ("B1", 16, 18)]
    only_first = simulate(gpipe(2, 2), even.scaled([3, 1], [1, 1]))
    assert spans(only_first, 1)[:2] == [("F0", 6, 7), ("F1", 7, 8)]
    # The gradient of microbatch 0 comes from chunk 1, where all are alike.
    assert spans(only_first, 0)[2] == ("B0", 11, 17)


def test_the_halves_of_a_backward_and_frozen_chunks() -> None:
    times = Durations((1, 1, 1), (5, 5, 5), (2, 2, 2), (4, 4, 4))
    split = simulate(zero_bubble(1, 2), Durations((1,), (5,), (2,), (4,)))
    assert spans(split, 0)[1] == ("B0", 1, 3)
    assert split.step_seconds == 14
    whole = simulate(make_schedule("1f1b", 3, 1, first_trainable_chunk=1, frozen_chunks=(2,)), times)
    # Chunk 2 passes gradients through (2), chunk 1 does all (5), chunk 0 nothing.
    assert [row[-1] for row in (spans(whole, 2), spans(whole, 1), spans(whole, 0))] == [
        ("B0", 3, 5),
        ("B0", 5, 10),
        ("F0", 0, 1),
    ]
    # Forward alone leaves nothing behind.
    assert whole.peak_activations == (0, 1, 1)


@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (1, 2), (3, 5)])
@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
def test_the_bubble_of_gpipe_and_1f1b(make: object, forward: int, backward: int) -> None:
    for stages, microbatches in SIZES:
        schedule = make(stages, microbatches)  # type: ignore[operator]
        timeline = simulate(schedule, Durations.uniform(stages, forward, backward, 1))
        assert timeline.step_seconds == (microbatches + stages - 1) * (forward + backward)
        assert timeline.bubble == (stages - 1) / (microbatches + stages - 1)


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaving_divides_the_bubble_by_the_chunks(chunks: int) -> None:
    """Also where the microbatches are no multiple of the stages."""
    for stages, microbatches in SIZES:
        timeline = simulate(interleaved(stages, microbatches, chunks), Durations.uniform(stages * chunks, 1, 2, 1))
        work = microbatches * chunks * 3
        if microbatches >= stages:
            assert timeline.step_seconds - work == (stages - 1) * 3
        else:
            # Nothing can be faster than one microbatch alone, and the others follow at a chunk's distance.
            assert timeline.step_seconds == (stages * chunks + microbatches - 1) * 3
        assert max(timeline.peak_activations) <= chunks * microbatches


@pytest.mark.parametrize(("f", "b", "w"), [(1, 1, 1), (2, 3, 1), (3, 3, 2), (10, 11, 9)])
def test_the_bubble_of_zero_bubble(f: int, b: int, w: int) -> None:
    """(p - 1)(F + B - W), as arXiv 2401.10241 gives it for ZB-H1, with the memory of 1F1B."""
    for stages, microbatches in SIZES:
        times = Durations.uniform(stages, f, b + w, w)
        timeline = simulate(zero_bubble(stages, microbatches, durations=times), times)
        if microbatches >= stages:
            assert timeline.step_seconds == microbatches * (f + b + w) + (stages - 1) * (f + b - w)
        assert max(timeline.peak_activations) <= min(stages, microbatches)


def test_zero_bubble_is_never_slower_than_1f1b() -> None:
    random.seed(1)
    ratios = []
    for _ in range(60):
        stages, microbatches = random.randint(1, 4), random.randint(1, 8)
        forward, inputs, weights = ([random.randint(2, 9) for _ in range(stages)] for _ in range(3))
        whole = [one + other for one, other in zip(inputs, weights, strict=True)]
        times = Durations.per_chunk(forward, whole, weights, transfer=random.choice([0, 1, 3]))
        times = times.scaled([random.randint(1, 4) for _ in range(microbatches)])
        made = simulate(zero_bubble(stages, microbatches, durations=times), times)
        ratios.append(made.step_seconds / simulate(one_f_one_b(stages, microbatches), times).step_seconds)
        assert max(made.peak_activations) <= stages
    assert max(ratios) <= 1
    assert sum(ratios) / len(ratios) < 0.97


@pytest.mark.parametrize(
    ("forward", "inputs", "weights", "transfer", "scale", "step", "without"),
    [
        ((5, 9, 6), (9, 7, 9), (4, 8, 9), 3, (3, 4, 4, 2, 3, 2, 3, 4), 720, 739),
        ((2, 5, 9, 3), (3, 2, 7, 7), (6, 7, 2, 8), 1, (4, 2, 3, 1, 4), 410, 411),
        ((2, 6, 8), (4, 9, 5), (2, 6, 9), 0, (3, 1, 1, 4, 2, 4, 4, 3), 527, 530),
        ((4, 4, 5), (5, 2, 4), (7, 8, 8), 1, (2, 2, 3, 2, 4, 4, 3, 3), 419, 420),
        ((4, 8, 8, 9), (2, 3, 9, 4), (3, 9, 8, 9), 0, (2, 1, 4, 3, 4, 1), 423, 424),
    ],
    ids=["ZB-H1", "1F1B with W after B", "greedy, no patience", "greedy, half a W", "greedy, a whole W"],
)
def test_each_candidate_of_zero_bubble_is_the_shortest_somewhere(
    forward: tuple[int, ...],
    inputs: tuple[int, ...],
    weights: tuple[int, ...],
    transfer: int,
    scale: tuple[int, ...],
    step: int,
    without: int,
) -> None:
    """`without`: the shortest step that the other candidates reach."""
    whole = [one + other for one, other in zip(inputs, weights, strict=True)]
    times = Durations.per_chunk(forward, whole, weights, transfer=transfer).scaled(scale)
    made = simulate(zero_bubble(len(forward), len(scale), durations=times), times)
    assert made.step_seconds <= step < without


@pytest.mark.parametrize("limit", [1, 2, 3, (3, 1, 2), (1, 3, 3)])
def test_zero_bubble_keeps_to_its_memory(limit: int | tuple[int, ...]) -> None:
    times = Durations.uniform(3, transfer=2)
    timeline = simulate(zero_bubble(3, 8, durations=times, memory_limit=limit), times)
    limits = (limit,) * 3 if isinstance(limit, int) else limit
    assert all(peak <= most for peak, most in zip(timeline.peak_activations, limits, strict=True))
    with pytest.raises(ValueError, match="at least 1 for each of 3 stages"):
        zero_bubble(3, 8, memory_limit=(1, 2))
    with pytest.raises(ValueError, match="at least 1 for each of 3 stages"):
        zero_bubble(3, 8, memory_limit=0)


def test_more_memory_hides_slow_transfers() -> None:
    times = Durations.uniform(2, transfer=2)
    steps = [simulate(zero_bubble(2, 12, durations=times, memory_limit=m), times).step_seconds for m in (1, 2, 4)]
    assert steps[0] > steps[1] > steps[2]


def test_peak_activations() -> None:
    for stages, microbatches in SIZES:
        assert peak_activations(gpipe(stages, microbatches)) == (microbatches,) * stages
        wanted = tuple(min(microbatches, stages - stage) for stage in range(stages))
        assert peak_activations(one_f_one_b(stages, microbatches)) == wanted


def test_peak_activations_in_bytes() -> None:
    assert peak_activations(one_f_one_b(2, 3), [100, 30]) == (200, 30)
    schedule = zero_bubble(2, 3)
    order = [f"{action.kind}{action.microbatch}" for action in schedule.compute_of(1)]
    assert order == ["F0", "B0", "F1", "B1", "W0", "F2", "B2", "W1", "W2"]
    assert peak_activations(schedule, [100, 30]) == (200, 60)
    # B leaves a third of it to W: one third and one whole.
    assert peak_activations(schedule, [100, 30], [100, 10]) == (200, 40)
    with pytest.raises(ScheduleError, match="1 and 1 activation weights given for 2 chunks"):
        peak_activations(schedule, [1])


def test_the_same_numbers_come_out_again_and_integers_stay_integers() -> None:
    times = Durations.uniform(3, 3, 7, 2, transfer=1)
    first, again = (simulate(zero_bubble(3, 5, durations=times), times) for _ in range(2))
    assert first == again
    assert all(type(span.end) is int for row in first.spans for span in row)


def test_no_time_at_all_is_no_bubble() -> None:
    timeline = simulate(one_f_one_b(2, 2), Durations.uniform(2, 0, 0, 0))
    assert (timeline.step_seconds, timeline.bubble, timeline.bubbles) == (0, 0.0, (0.0, 0.0))


def test_durations_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="one number for each chunk"):
        Durations((1,), (1, 2), (1,), (1,))
    with pytest.raises(ValueError, match="finite and not negative"):
        Durations((float("nan"),), (1,), (1,), (1,))
    with pytest.raises(ValueError, match="transfer -1"):
        Durations.uniform(1, transfer=-1)
    with pytest.raises(ValueError, match="give the backward with its weight part"):
        Durations.uniform(2, 1, 1, 2)
    with pytest.raises(ValueError, match="2 forward, 1 backward"):
        Durations.per_chunk([1, 1], [1], [1])
    with pytest.raises(ValueError, match="a row for each of 3 chunks, got 2"):
        Durations.uniform(3).scaled([1], [1])
    with pytest.raises(ValueError, match=r"F1\.0 has no scale"):
        simulate(gpipe(1, 2), Durations.uniform(1).scaled([1]))
    with pytest.raises(ScheduleError, match=r"for 2 chunks, schedule gpipe has 1"):
        simulate(gpipe(1, 2), Durations.uniform(2))
    with pytest.raises(ValueError, match=r"SEND_F0\.0 does not compute"):
        Durations.uniform(1).seconds(Action(Kind.SEND_F, 0, 0), split=False, trainable=True)
