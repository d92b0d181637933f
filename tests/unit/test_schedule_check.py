"""The checker lets no broken schedule through and refuses none that can be run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import pytest

from ray_ministral.pipeline.generators import gpipe, interleaved, make_schedule, one_f_one_b
from ray_ministral.pipeline.schedule import RECEIVES, SENDS, Action, Kind, Schedule, ScheduleError, play
from ray_ministral.pipeline.schedule_check import check
from ray_ministral.pipeline.zero_bubble import zero_bubble

SMALL = {
    "gpipe": gpipe(2, 3),
    "1f1b": one_f_one_b(3, 4),
    "interleaved": interleaved(2, 3, 2),
    "interleaved on one stage": interleaved(1, 2, 3),
    "zero-bubble": zero_bubble(3, 3),
    "one stage": zero_bubble(1, 3),
    "frozen ends": make_schedule("zero-bubble", 3, 3, first_trainable_chunk=1, frozen_chunks=(2,)),
    "forward only": make_schedule("1f1b", 3, 3, first_trainable_chunk=3),
}


def with_row(schedule: Schedule, stage: int, row: list[Action]) -> Schedule:
    return replace(schedule, actions=(*schedule.actions[:stage], tuple(row), *schedule.actions[stage + 1 :]))


def places(schedule: Schedule) -> Iterator[tuple[int, int, Action]]:
    for stage, row in enumerate(schedule.actions):
        for place, action in enumerate(row):
            yield stage, place, action


def runnable(schedule: Schedule) -> bool:
    """What `check` should say of a reordered schedule, from a graph: no cycle, and messages in order.

    Edges: the order on each stage, what each action needs, SEND before its RECV, ascending B and W.
    """
    everywhere = {action for _, _, action in places(schedule)}
    graph: dict[Action, set[Action]] = {action: set() for action in everywhere}

    def edge(before: Action, after: Action) -> None:
        if before in everywhere and after in everywhere:
            graph[after].add(before)

    for row in schedule.actions:
        for before, after in pairwise(row):
            edge(before, after)
    for action in everywhere:
        m, c = action.microbatch, action.chunk
        edge(Action(Kind.RECV_F, m, c), Action(Kind.F, m, c))
        edge(Action(Kind.F, m, c), Action(Kind.SEND_F, m, c))
        edge(Action(Kind.F, m, c), Action(Kind.B, m, c))
        edge(Action(Kind.RECV_B, m, c), Action(Kind.B, m, c))
        edge(Action(Kind.B, m, c), Action(Kind.SEND_B, m, c))
        edge(Action(Kind.B, m, c), Action(Kind.W, m, c))
        edge(Action(Kind.B, m, c), Action(Kind.B, m + 1, c))
        edge(Action(Kind.W, m, c), Action(Kind.W, m + 1, c))
        edge(Action(Kind.F, m, c), Action(Kind.F, m, c + 1))
        edge(Action(Kind.B, m, c), Action(Kind.B, m, c - 1))
        if action.kind in SENDS:
            edge(action, action.partner)
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError:
        return False
    for one in range(schedule.num_stages):
        for other in range(schedule.num_stages):
            sent = [a.partner for a in schedule.actions[one] if a.kind in SENDS and schedule.peer(a) == other]
            received = [a for a in schedule.actions[other] if a.kind in RECEIVES and schedule.peer(a) == one]
            if sent != received:
                return False
    return True


@pytest.mark.parametrize("name", SMALL)
def test_the_originals_pass(name: str) -> None:
    assert runnable(SMALL[name])
    assert check(SMALL[name]).num_actions == len(list(places(SMALL[name])))


@pytest.mark.parametrize("name", SMALL)
def test_a_dropped_action_is_named(name: str) -> None:
    for stage, place, action in places(SMALL[name]):
        row = list(SMALL[name].actions[stage])
        del row[place]
        with pytest.raises(ScheduleError, match=rf"^stage {stage}: {action} is missing$"):
            check(with_row(SMALL[name], stage, row))


@pytest.mark.parametrize("name", SMALL)
def test_a_doubled_action_is_named(name: str) -> None:
    for stage, place, action in places(SMALL[name]):
        row = list(SMALL[name].actions[stage])
        row.append(row[place])
        with pytest.raises(ScheduleError, match=rf"^stage {stage}: {action} is there twice, again at {len(row) - 1}$"):
            check(with_row(SMALL[name], stage, row))


@pytest.mark.parametrize("name", SMALL)
def test_any_two_swapped_actions_pass_exactly_if_the_schedule_can_still_be_run(name: str) -> None:
    verdicts = {True: 0, False: 0}
    for stage, row in enumerate(SMALL[name].actions):
        for one in range(len(row)):
            for other in range(one + 1, len(row)):
                swapped = list(row)
                swapped[one], swapped[other] = swapped[other], swapped[one]
                mutant = with_row(SMALL[name], stage, swapped)
                wanted = runnable(mutant)
                verdicts[wanted] += 1
                if wanted:
                    check(mutant)
                else:
                    with pytest.raises(ScheduleError):
                        check(mutant)
    assert verdicts[False] > 0, "no swap broke anything: the test proves nothing"


def test_shuffled_computations_pass_exactly_if_they_can_be_run() -> None:
    """Whole rows in other orders, with SEND and RECV put in anew: deadlocks across stages that no swap makes."""
    random.seed(0)
    verdicts = {True: 0, False: 0}
    deadlocks = 0
    for _ in range(400):
        original = random.choice([interleaved(2, 2, 2), one_f_one_b(2, 2), interleaved(3, 1, 2)])
        rows = []
        for stage in range(original.num_stages):
            row = list(original.compute_of(stage))
            for _ in range(random.randint(0, 3)):
                place = random.randrange(len(row) - 1)
                row[place], row[place + 1] = row[place + 1], row[place]
            rows.append(row)
        mutant = Schedule.from_compute("shuffled", rows, original.num_microbatches, original.trainable)
        wanted = runnable(mutant)
        verdicts[wanted] += 1
        if wanted:
            check(mutant)
            continue
        with pytest.raises(ScheduleError) as caught:
            check(mutant)
        deadlocks += "deadlock" in str(caught.value)
    assert min(verdicts.values()) > 20
    assert deadlocks > 0


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("RECV_F0.1", "F0.1", "F0.1 at 0 comes before RECV_F0.1"),
        ("F0.1", "B0.1", "B0.1 at 1 comes before F0.1"),
        ("B0.1", "SEND_B0.1", "SEND_B0.1 at 2 comes before B0.1"),
    ],
)
def test_the_first_action_out_of_order_is_named(before: str, after: str, says: str) -> None:
    schedule = one_f_one_b(2, 2)
    row = list(schedule.actions[1])
    names = [str(action) for action in row]
    one, other = names.index(before), names.index(after)
    row[one], row[other] = row[other], row[one]
    with pytest.raises(ScheduleError, match=says):
        check(with_row(schedule, 1, row))


def test_gradients_are_summed_in_ascending_order() -> None:
    rows = [[Action(Kind.F, 0, 0), Action(Kind.F, 1, 0), Action(Kind.B, 1, 0), Action(Kind.B, 0, 0)]]
    with pytest.raises(ScheduleError, match=r"B1\.0 at 2 comes before B0\.0"):
        check(Schedule.from_compute("descending", rows, 2, (True,)))
    weights = list(zero_bubble(1, 2).actions[0])
    names = [str(action) for action in weights]
    weights.append(weights.pop(names.index("W0.0")))
    with pytest.raises(ScheduleError, match=r"W1\.0 at \d comes before W0\.0"):
        check(with_row(zero_bubble(1, 2), 0, weights))


def test_messages_in_another_order_are_named() -> None:
    schedule = gpipe(2, 2)
    row = list(schedule.actions[1])
    names = [str(action) for action in row]
    one, other = names.index("RECV_F0.1"), names.index("RECV_F1.1")
    # Both at the front, the second first: on its own this stage is in order.
    row = [row[other], row[one], *(action for place, action in enumerate(row) if place not in {one, other})]
    mutant = with_row(schedule, 1, row)
    with pytest.raises(ScheduleError, match=r"message 0 from stage 0 to stage 1: sent as SEND_F0\.0, but RECV_F1\.1"):
        check(mutant)
    with pytest.raises(ScheduleError, match=r"RECV_F1\.1 is next to receive, but stage 0 sent SEND_F0\.0 first"):
        list(play(mutant))


def test_a_deadlock_says_where_each_stage_waits() -> None:
    # Each stage wants the other's chunk first: stage 0 the gradient of microbatch 0, stage 1 the input of 1.
    rows = [
        [Action(Kind.F, 0, 0), Action(Kind.B, 0, 0), Action(Kind.F, 1, 0), Action(Kind.B, 1, 0)],
        [Action(Kind.F, 0, 1), Action(Kind.F, 1, 1), Action(Kind.B, 0, 1), Action(Kind.B, 1, 1)],
    ]
    schedule = Schedule.from_compute("stuck", rows, 2, (True, True))
    with pytest.raises(ScheduleError, match=r"deadlock: stage 0 waits at RECV_B0\.0.*; stage 1 waits at RECV_F1\.1"):
        check(schedule)


def test_foreign_actions_are_refused() -> None:
    schedule = one_f_one_b(2, 2)
    for action in (
        Action(Kind.F, 0, 1),
        Action(Kind.F, 2, 0),
        Action(Kind.W, 0, 0),
        Action(Kind.SEND_B, 0, 0),
        Action(Kind.RECV_F, 0, 0),
    ):
        with pytest.raises(ScheduleError, match=f"{action} at 0 does not belong here"):
            check(with_row(schedule, 0, [action, *schedule.actions[0]]))
    with pytest.raises(ScheduleError, match="2 stages, but actions for 1"):
        check(replace(schedule, actions=schedule.actions[:1]))
    with pytest.raises(ScheduleError, match="2 chunks, but `trainable` speaks of 1"):
        check(replace(schedule, trainable=(True,)))


def test_blocking_sends_are_reported() -> None:
    # GPipe sends one way at a time; in 1F1B two neighbours send to each other at once.
    assert check(gpipe(3, 4)).rendezvous_stuck == ()
    assert check(one_f_one_b(1, 4)).rendezvous_stuck == ()
    assert check(one_f_one_b(2, 1)).rendezvous_stuck == ()
    assert check(one_f_one_b(2, 3)).rendezvous_stuck == (
        "stage 0 waits at SEND_F1.0, its action 3 of 12",
        "stage 1 waits at SEND_B0.1, its action 3 of 12",
    )
