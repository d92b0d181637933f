"""`simulate`: a schedule with durations gives a `Timeline`: start and end of each action, bubble, live activations.

Pure arithmetic on the numbers that come in: integers stay integers, and the same input gives the same output.
It knows no clock and no machine; `Durations` are measured or guessed by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ray_ministral.pipeline.schedule import COMPUTE, RECEIVES, Action, Kind, Schedule, ScheduleError, play


@dataclass(frozen=True)
class Durations:
    """Seconds (or any other unit) of each chunk's actions, for one microbatch.

    forward, backward: F, and B where the backward is not split.
    backward_input, backward_weight: B and W where it is; B of a frozen chunk is `backward_input` in any schedule.
    transfer: from a SEND to the arrival of its message; the stages compute meanwhile.
    handling: how long each SEND and each RECV keeps its stage from computing.
    scale: factors [chunk][microbatch] for microbatches of unequal size, transfers included; empty: all alike.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    transfer: float = 0
    handling: float = 0
    scale: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        rows = (self.forward, self.backward, self.backward_input, self.backward_weight)
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"durations need one number for each chunk, got {[len(row) for row in rows]} of each kind")
        if self.scale and len(self.scale) != len(self.forward):
            raise ValueError(f"scale needs a row for each of {len(self.forward)} chunks, got {len(self.scale)}")
        if not all(0 <= number < float("inf") for row in (*rows, *self.scale) for number in row):
            raise ValueError(f"durations and scales must be finite and not negative, got {self}")
        if not (0 <= self.transfer < float("inf") and 0 <= self.handling < float("inf")):
            raise ValueError(f"transfer {self.transfer} and handling {self.handling} must be finite and not negative")

    @classmethod
    def per_chunk(
        cls,
        forward: Sequence[float],
        backward: Sequence[float],
        weight: Sequence[float],
        *,
        transfer: float = 0,
        handling: float = 0,
    ) -> Durations:
        """From the whole backward and the part of it that the gradients of the weights take; splitting is free."""
        if not len(forward) == len(backward) == len(weight):
            raise ValueError(f"got {len(forward)} forward, {len(backward)} backward and {len(weight)} weight durations")
        if any(part > whole for whole, part in zip(backward, weight, strict=True)):
            raise ValueError(
                f"the weight part {list(weight)} cannot be longer than the whole backward {list(backward)}: "
                "give the backward with its weight part"
            )
        split = tuple(whole - part for whole, part in zip(backward, weight, strict=True))
        return cls(tuple(forward), tuple(backward), split, tuple(weight), transfer, handling)

    @classmethod
    def uniform(
        cls,
        num_chunks: int,
        forward: float = 1,
        backward: float = 2,
        weight: float = 1,
        *,
        transfer: float = 0,
        handling: float = 0,
    ) -> Durations:
        """Every chunk alike; `backward` is the whole backward, `weight` the part of it that W takes."""
        return cls.per_chunk(
            (forward,) * num_chunks,
            (backward,) * num_chunks,
            (weight,) * num_chunks,
            transfer=transfer,
            handling=handling,
        )

    def scaled(self, *rows: Sequence[float]) -> Durations:
        """With factors per microbatch: one row for all chunks, or a row for each chunk."""
        if len(rows) == 1:
            rows = rows * len(self.forward)
        return replace(self, scale=tuple(tuple(row) for row in rows))

    def factor(self, action: Action) -> float:
        """How much larger than usual this action's microbatch is."""
        if not self.scale:
            return 1
        row = self.scale[action.chunk]
        if action.microbatch >= len(row):
            raise ValueError(f"{action} has no scale: chunk {action.chunk} has factors for {len(row)} microbatches")
        return row[action.microbatch]

    def seconds(self, action: Action, *, split: bool, trainable: bool) -> float:
        """How long an F, B or W takes; `split` and `trainable` tell the whole backward from its halves."""
        match action.kind:
            case Kind.F:
                table = self.forward
            case Kind.B:
                table = self.backward_input if split or not trainable else self.backward
            case Kind.W:
                table = self.backward_weight
            case _:
                raise ValueError(f"{action} does not compute, it has no duration")
        return table[action.chunk] * self.factor(action)


class Span(NamedTuple):
    """An action and the seconds from the beginning of the step at which it starts and ends."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step.

    spans: what each stage computes, in order. peak_activations: for each stage the most that is alive at once, from
    the end of F to the end of the last action that needs it, in the unit of `simulate`'s `activations`.
    """

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    peak_activations: tuple[float, ...]

    @property
    def step_seconds(self) -> float:
        """From the first action to the end of the last one."""
        return max(row[-1].end for row in self.spans)

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """How long each stage computes."""
        return tuple(sum(span.end - span.start for span in row) for row in self.spans)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """For each stage the share of the step in which it does not compute."""
        step = self.step_seconds
        return tuple(1 - busy / step if step else 0.0 for busy in self.busy_seconds)

    @property
    def bubble(self) -> float:
        """The share of all stages' time in which they do not compute."""
        whole = self.step_seconds * len(self.spans)
        return (whole - sum(self.busy_seconds)) / whole if whole else 0.0


def simulate(
    schedule: Schedule,
    durations: Durations,
    activations: Sequence[float] | None = None,
    kept_for_weights: Sequence[float] | None = None,
) -> Timeline:
    """Play a schedule that passes `check` against durations.

    activations: for each chunk what one microbatch's activations weigh (bytes, or 1 for a count, the default).
    kept_for_weights: what is left of that between B and W where the backward is split; the default: all of it.
    A stage does one thing at a time and waits in RECV; messages take `transfer` however many are on the way.
    """
    if len(durations.forward) != schedule.num_chunks:
        raise ScheduleError(
            f"durations are for {len(durations.forward)} chunks, schedule {schedule.name} has {schedule.num_chunks}"
        )
    clock: list[float] = [0] * schedule.num_stages
    arrival: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in clock]
    for stage, action in play(schedule):
        if action.kind in COMPUTE:
            start = clock[stage]
            clock[stage] = start + seconds_in(schedule, durations, action)
            spans[stage].append(Span(action, start, clock[stage]))
        elif action.kind in RECEIVES:
            clock[stage] = max(clock[stage], arrival.pop(action)) + durations.handling
        else:
            clock[stage] += durations.handling
            arrival[action.partner] = clock[stage] + durations.transfer * durations.factor(action)
    peaks = peak_activations(schedule, activations, kept_for_weights)
    return Timeline(schedule, tuple(tuple(row) for row in spans), peaks)


def seconds_in(schedule: Schedule, durations: Durations, action: Action) -> float:
    """How long an F, B or W takes in this schedule."""
    trainable = schedule.trainable[action.chunk]
    return durations.seconds(action, split=schedule.splits_backward, trainable=trainable)


def peak_activations(
    schedule: Schedule,
    activations: Sequence[float] | None = None,
    kept_for_weights: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """The most that each stage holds at once; arguments as in `simulate`. Durations do not matter: order decides."""
    whole = activations if activations is not None else (1,) * schedule.num_chunks
    rest = kept_for_weights if kept_for_weights is not None else whole
    if not len(whole) == len(rest) == schedule.num_chunks:
        raise ScheduleError(f"{len(whole)} and {len(rest)} activation weights given for {schedule.num_chunks} chunks")
    peaks: list[float] = []
    for stage in range(schedule.num_stages):
        alive: float = 0
        peak: float = 0
        for action in schedule.compute_of(stage):
            last = schedule.last_use(action.chunk)
            if action.kind is Kind.F and last is not Kind.F:
                alive += whole[action.chunk]
            elif action.kind is Kind.B:
                alive -= whole[action.chunk] - (rest[action.chunk] if last is Kind.W else 0)
            elif action.kind is Kind.W:
                alive -= rest[action.chunk]
            peak = max(peak, alive)
        peaks.append(peak)
    return tuple(peaks)
