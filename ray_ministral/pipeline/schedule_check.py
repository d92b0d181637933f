"""`check`: proves that a schedule can be run and gives the same gradients as any other, or names what is wrong.

It trusts nothing that the generators promise and reads only the actions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ray_ministral.pipeline.schedule import (
    RECEIVES,
    SENDS,
    Action,
    Kind,
    Schedule,
    ScheduleError,
    play,
    stuck_at,
)


@dataclass(frozen=True)
class CheckReport:
    """A schedule that passed. `rendezvous_stuck`: where stages would wait for ever if a SEND waited for its RECV to be
    reached; empty if even that works. Only information: our sends do not wait.
    """

    num_actions: int
    rendezvous_stuck: tuple[str, ...]


def check(schedule: Schedule) -> CheckReport:
    """Raise `ScheduleError` that names the first offending action, or report.

    Each wanted action once, on the stage of its chunk; everything before what needs it; W, and B, of a chunk in
    ascending order of microbatches (so that gradients are summed in one order in every schedule); messages between
    two stages received in the order in which they are sent (NCCL matches by order); no deadlock when a SEND does not
    wait and a RECV does.
    """
    _check_shape(schedule)
    for stage in range(schedule.num_stages):
        _check_counts(schedule, stage)
        _check_order(schedule, stage)
    _check_messages(schedule)
    for _ in play(schedule):
        pass
    return CheckReport(sum(len(actions) for actions in schedule.actions), _rendezvous(schedule))


def _check_shape(schedule: Schedule) -> None:
    if len(schedule.actions) != schedule.num_stages:
        raise ScheduleError(f"{schedule.num_stages} stages, but actions for {len(schedule.actions)}")
    if len(schedule.trainable) != schedule.num_chunks:
        raise ScheduleError(f"{schedule.num_chunks} chunks, but `trainable` speaks of {len(schedule.trainable)}")


def _check_counts(schedule: Schedule, stage: int) -> None:
    """Each wanted action of this stage is there once, and no other."""
    wanted = [
        Action(kind, microbatch, chunk)
        for chunk in schedule.chunks_of(stage)
        for kind in Kind
        if schedule.wants(kind, chunk)
        for microbatch in range(schedule.num_microbatches)
    ]
    allowed = set(wanted)
    seen: Counter[Action] = Counter()
    for place, action in enumerate(schedule.actions[stage]):
        seen[action] += 1
        if action not in allowed:
            raise ScheduleError(
                f"stage {stage}: {action} at {place} does not belong here: the stage has chunks "
                f"{list(schedule.chunks_of(stage))} and {schedule.num_microbatches} microbatches, "
                f"trainable chunks are {[c for c, trains in enumerate(schedule.trainable) if trains]}, "
                f"the backward is {'' if schedule.splits_backward else 'not '}split"
            )
        if seen[action] > 1:
            raise ScheduleError(f"stage {stage}: {action} is there twice, again at {place}")
    for action in wanted:
        if not seen[action]:
            raise ScheduleError(f"stage {stage}: {action} is missing")


def _needed_by(schedule: Schedule, action: Action) -> list[Action]:
    """The actions of the same stage that must come before this one."""
    microbatch, chunk = action.microbatch, action.chunk
    # Ascending order of what sums gradients, microbatch by microbatch.
    before = [Action(action.kind, microbatch - 1, chunk)] if action.kind in {Kind.B, Kind.W} and microbatch else []
    match action.kind:
        case Kind.F if chunk > 0:
            receives = schedule.wants(Kind.RECV_F, chunk)
            before.append(Action(Kind.RECV_F, microbatch, chunk) if receives else Action(Kind.F, microbatch, chunk - 1))
        case Kind.B:
            before.append(Action(Kind.F, microbatch, chunk))
            if chunk + 1 < schedule.num_chunks:
                receives = schedule.wants(Kind.RECV_B, chunk)
                kind, source = (Kind.RECV_B, chunk) if receives else (Kind.B, chunk + 1)
                before.append(Action(kind, microbatch, source))
        case Kind.W | Kind.SEND_B:
            before.append(Action(Kind.B, microbatch, chunk))
        case Kind.SEND_F:
            before.append(Action(Kind.F, microbatch, chunk))
    return before


def _check_order(schedule: Schedule, stage: int) -> None:
    """On this stage everything comes after what it needs."""
    done: set[Action] = set()
    for place, action in enumerate(schedule.actions[stage]):
        for need in _needed_by(schedule, action):
            if need not in done:
                raise ScheduleError(f"stage {stage}: {action} at {place} comes before {need}, which it must follow")
        done.add(action)


def _check_messages(schedule: Schedule) -> None:
    """Between two stages the n-th RECV takes the n-th SEND."""
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[Action]] = {}
    for stage, actions in enumerate(schedule.actions):
        for action in actions:
            if action.kind in SENDS:
                sent.setdefault((stage, schedule.peer(action)), []).append(action)
            elif action.kind in RECEIVES:
                received.setdefault((schedule.peer(action), stage), []).append(action)
    for source, target in sorted(sent.keys() | received.keys()):
        sends, receives = sent.get((source, target), []), received.get((source, target), [])
        # Equally many, or something would have been missing above.
        for number, (send, receive) in enumerate(zip(sends, receives, strict=True)):
            if send.partner != receive:
                raise ScheduleError(
                    f"message {number} from stage {source} to stage {target}: sent as {send}, but {receive} is "
                    f"received, where {send.partner} would match"
                )


def _rendezvous(schedule: Schedule) -> tuple[str, ...]:
    """Where the stages stand when none can go on and a SEND waits until its RECV is reached; empty if they finish."""
    position = [0] * schedule.num_stages

    def current(stage: int) -> Action | None:
        actions = schedule.actions[stage]
        return actions[position[stage]] if position[stage] < len(actions) else None

    moved = True
    while moved:
        moved = False
        for stage in range(schedule.num_stages):
            while (action := current(stage)) is not None:
                if action.kind in SENDS:
                    peer = schedule.peer(action)
                    if current(peer) != action.partner:
                        break
                    position[peer] += 1
                elif action.kind in RECEIVES:
                    # The sender moves both.
                    break
                position[stage] += 1
                moved = True
    return stuck_at(schedule, position)
