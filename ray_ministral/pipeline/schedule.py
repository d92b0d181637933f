"""`Action` and `Schedule`: what each stage does in what order, as data; and `play`, which goes through it.

A schedule knows neither durations nor tensors. `generators` and `zero_bubble` make schedules, `schedule_check` proves
them executable, `simulator` gives them time and memory, `schedule_grid` prints them, and the stage's interpreter runs
them. Nobody else needs to change for a new schedule. No torch, no Ray.

`python -m ray_ministral.pipeline.schedule --help` prints and compares schedules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum


class ScheduleError(ValueError):
    """A schedule that cannot be run as it stands. A bug of whoever made it, never of a user's options."""


class Kind(StrEnum):
    """What an action does. `W` exists only where the backward is split in two."""

    F = "F"
    """Forward of a chunk."""
    B = "B"
    """Backward of a chunk: all of it, or only the gradient of the input where the backward is split."""
    W = "W"
    """The gradients of the weights, where the backward is split."""
    SEND_F = "SEND_F"
    """The output of a chunk goes to the next chunk's stage."""
    RECV_F = "RECV_F"
    """The input of a chunk comes from the previous chunk's stage."""
    SEND_B = "SEND_B"
    """The gradient of a chunk's input goes to the previous chunk's stage."""
    RECV_B = "RECV_B"
    """The gradient of a chunk's output comes from the next chunk's stage."""


COMPUTE = frozenset({Kind.F, Kind.B, Kind.W})
SENDS = frozenset({Kind.SEND_F, Kind.SEND_B})
RECEIVES = frozenset({Kind.RECV_F, Kind.RECV_B})


@dataclass(frozen=True, order=True, slots=True)
class Action:
    """One step of one stage. `chunk` is the global index of the chunk that *this* stage works for, also in a SEND or
    RECV: `SEND_F(m, c)` is matched by `RECV_F(m, c + 1)`, `SEND_B(m, c)` by `RECV_B(m, c - 1)`.
    """

    kind: Kind
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}.{self.chunk}"

    @property
    def partner(self) -> Action:
        """The RECV that takes what this SEND gives, or the other way round; `ValueError` for what computes."""
        match self.kind:
            case Kind.SEND_F:
                return Action(Kind.RECV_F, self.microbatch, self.chunk + 1)
            case Kind.RECV_F:
                return Action(Kind.SEND_F, self.microbatch, self.chunk - 1)
            case Kind.SEND_B:
                return Action(Kind.RECV_B, self.microbatch, self.chunk - 1)
            case Kind.RECV_B:
                return Action(Kind.SEND_B, self.microbatch, self.chunk + 1)
            case _:
                raise ValueError(f"{self} computes, it has no partner on another stage")


@dataclass(frozen=True)
class Schedule:
    """The actions of every stage for one step.

    Chunk c lives on stage c % num_stages (the interleaved layout of Megatron-LM, arXiv 2104.04473). `trainable[c]`
    says whether chunk c has weights to train: chunks before the first such one get no B, and nobody sends them
    gradients; a later chunk without any gets B but no W. All False is a forward-only step.
    """

    name: str
    num_stages: int
    chunks_per_stage: int
    num_microbatches: int
    splits_backward: bool
    trainable: tuple[bool, ...]
    actions: tuple[tuple[Action, ...], ...]

    @classmethod
    def from_compute(
        cls,
        name: str,
        compute: Sequence[Sequence[Action]],
        num_microbatches: int,
        trainable: Sequence[bool],
        *,
        splits_backward: bool = False,
    ) -> Schedule:
        """A schedule from the order in which each stage computes.

        What frozen chunks do not want is left out; the rest keeps its order, so an order without deadlock stays one.
        Then SEND and RECV are put in.
        """
        stages = len(compute)
        bare = cls(name, stages, len(trainable) // stages, num_microbatches, splits_backward, tuple(trainable), ())
        kept = [[action for action in actions if bare.wants(action.kind, action.chunk)] for actions in compute]
        return replace(bare, actions=_with_communication(bare, kept))

    @property
    def num_chunks(self) -> int:
        """Chunks of all stages."""
        return self.num_stages * self.chunks_per_stage

    def stage_of(self, chunk: int) -> int:
        """The stage that holds a chunk."""
        return chunk % self.num_stages

    def chunks_of(self, stage: int) -> range:
        """Global indices of the chunks of a stage."""
        return range(stage, self.num_chunks, self.num_stages)

    def compute_of(self, stage: int) -> tuple[Action, ...]:
        """The actions of a stage without SEND and RECV."""
        return tuple(action for action in self.actions[stage] if action.kind in COMPUTE)

    @property
    def first_trainable_chunk(self) -> int:
        """The first chunk that has a backward; `num_chunks` if none has."""
        return next((chunk for chunk, trains in enumerate(self.trainable) if trains), self.num_chunks)

    def wants(self, kind: Kind, chunk: int) -> bool:
        """Whether this chunk has actions of this kind, one for each microbatch."""
        match kind:
            case Kind.F:
                return True
            case Kind.B:
                return chunk >= self.first_trainable_chunk
            case Kind.W:
                return self.splits_backward and self.trainable[chunk]
            case Kind.SEND_F:
                return self.num_stages > 1 and chunk + 1 < self.num_chunks
            case Kind.RECV_F:
                return self.num_stages > 1 and chunk > 0
            case Kind.SEND_B:
                return self.num_stages > 1 and chunk > self.first_trainable_chunk
            case Kind.RECV_B:
                return self.num_stages > 1 and self.first_trainable_chunk <= chunk < self.num_chunks - 1

    def peer(self, action: Action) -> int:
        """The stage at the other end of a SEND or RECV."""
        return self.stage_of(action.partner.chunk)

    def last_use(self, chunk: int) -> Kind:
        """The action of a chunk after which nothing needs the activations of its microbatch any more."""
        return next((kind for kind in (Kind.W, Kind.B) if self.wants(kind, chunk)), Kind.F)


_NEEDS = {Kind.F: Kind.RECV_F, Kind.B: Kind.RECV_B}
_MAKES = {Kind.F: Kind.SEND_F, Kind.B: Kind.SEND_B}


def _around(schedule: Schedule, action: Action, table: dict[Kind, Kind]) -> Action | None:
    kind = table.get(action.kind)
    if kind is None or not schedule.wants(kind, action.chunk):
        return None
    return Action(kind, action.microbatch, action.chunk)


def _with_communication(schedule: Schedule, compute: Sequence[Sequence[Action]]) -> tuple[tuple[Action, ...], ...]:
    """Each SEND directly after what made it, each RECV directly before what needs it.

    Between two stages NCCL matches messages by their order alone. So where one stage sends in another order than its
    peer needs, the peer receives the earlier messages first. It waits no longer for that: they were sent earlier.
    """
    mail: dict[tuple[int, int], deque[Action]] = {}
    for stage, actions in enumerate(compute):
        for action in actions:
            if send := _around(schedule, action, _MAKES):
                mail.setdefault((stage, schedule.peer(send)), deque()).append(send.partner)
    placed = []
    for stage, actions in enumerate(compute):
        row: list[Action] = []
        received: set[Action] = set()
        for action in actions:
            need = _around(schedule, action, _NEEDS)
            while need is not None and need not in received:
                waiting = mail.get((schedule.peer(need), stage))
                # Nobody sends it: `check` names the action that is missing.
                message = waiting.popleft() if waiting else need
                received.add(message)
                row.append(message)
            row.append(action)
            if send := _around(schedule, action, _MAKES):
                row.append(send)
        placed.append(tuple(row))
    return tuple(placed)


def play(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """Every (stage, action) in an order in which one process could do them all: SEND does not wait, RECV does.

    Messages between two stages arrive in the order in which they were sent. Raises `ScheduleError` when no stage can
    go on, or a RECV finds another message than its own.
    """
    position = [0] * schedule.num_stages
    mail: dict[tuple[int, int], deque[Action]] = {}
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(schedule.actions):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                if action.kind in SENDS:
                    mail.setdefault((stage, schedule.peer(action)), deque()).append(action)
                elif action.kind in RECEIVES:
                    waiting = mail.get((schedule.peer(action), stage))
                    if not waiting:
                        break
                    message = waiting.popleft()
                    if message.partner != action:
                        raise ScheduleError(
                            f"stage {stage}: {action} is next to receive, but stage {schedule.peer(action)} sent "
                            f"{message} first: receive in the order of the sends"
                        )
                position[stage] += 1
                moved = True
                yield stage, action
    stuck = stuck_at(schedule, position)
    if stuck:
        raise ScheduleError(f"deadlock: {'; '.join(stuck)}")


def stuck_at(schedule: Schedule, position: Sequence[int]) -> tuple[str, ...]:
    """Where each stage that is not done waits, in words; `position` counts the actions done."""
    return tuple(
        f"stage {stage} waits at {actions[position[stage]]}, its action {position[stage]} of {len(actions)}"
        for stage, actions in enumerate(schedule.actions)
        if position[stage] < len(actions)
    )


if __name__ == "__main__":
    # This file is then the module `__main__`, whose classes are not those that the other modules import.
    from ray_ministral.pipeline.schedule_report import main

    raise SystemExit(main())
