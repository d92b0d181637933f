"""`ScheduleMaker`: the schedule of each step, by durations that earlier steps had.

Every schedule gives the same bits, so a better one may take over between two steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from statistics import median

from ray_ministral.pipeline.generators import ScheduleName, make_schedule
from ray_ministral.pipeline.schedule import Kind, Schedule
from ray_ministral.pipeline.simulator import Durations, Span

FIRST_STEPS = 1
"""Steps that say nothing: memory is touched for the first time, and the optimizer makes its moments."""

AHEAD = 1
"""Microbatches whose activations a stage under zero-bubble may hold beyond what 1F1B needs on its first stage: where
stages are uneven, the slowest one then never waits for the others (see `zero_bubble`)."""


class ScheduleMaker:
    """Schedules of one pipeline. `trainable`: whether each chunk has weights to train."""

    def __init__(self, name: ScheduleName, stages: int, trainable: Sequence[bool]) -> None:
        self._name, self._stages, self._trainable = name, stages, tuple(trainable)
        self._first = self._trainable.index(True)
        self._seen = -FIRST_STEPS
        self._seconds: dict[tuple[Kind, int], list[float]] = defaultdict(list)
        self._make = lru_cache(maxsize=8)(self._schedule)
        self._durations: Durations | None = None

    def schedule(self, microbatches: int) -> Schedule:
        """For a step of so many microbatches."""
        return self._make(microbatches, self._durations)

    def observe(self, stages: Sequence[Sequence[Span]]) -> None:
        """What each stage of the pipeline did in a step. The order is thought over after 1, 2, 4, 8 … steps."""
        self._seen += 1
        if self._name != "zero-bubble" or self._seen < 1:
            return  # the other orders do not depend on durations
        for spans in stages:
            for span in spans:
                self._seconds[span.action.kind, span.action.chunk].append(span.end - span.start)
        if self._seen & (self._seen - 1) == 0:
            self._durations = measured_durations(self._seconds, len(self._trainable))
            self._seconds.clear()

    def _schedule(self, microbatches: int, durations: Durations | None) -> Schedule:
        frozen = [chunk for chunk, trains in enumerate(self._trainable) if not trains and chunk > self._first]
        limit = self._stages - self._first + AHEAD if self._name == "zero-bubble" else None
        return make_schedule(
            self._name,
            self._stages,
            microbatches,
            len(self._trainable) // self._stages,
            first_trainable_chunk=self._first,
            frozen_chunks=frozen,
            durations=durations,
            memory_limit=limit,
        )


def measured_durations(
    seconds: Mapping[tuple[Kind, int], Sequence[float]],
    num_chunks: int,
    average: Callable[[Sequence[float]], float] = median,
) -> Durations:
    """Of each chunk the average of each kind of action; `seconds` by kind and chunk. What was not seen takes none.

    The backward counts as split where the weight part was seen by itself.
    """

    def row(kind: Kind) -> tuple[float, ...]:
        return tuple(average(seconds.get((kind, chunk)) or [0.0]) for chunk in range(num_chunks))

    forward, backward, weight = row(Kind.F), row(Kind.B), row(Kind.W)
    whole = tuple(one + other for one, other in zip(backward, weight, strict=True))
    handling = [
        value for (kind, _), values in seconds.items() if kind in {Kind.SEND_F, Kind.SEND_B} for value in values
    ]
    return Durations(forward, whole, backward, weight, handling=average(handling or [0.0]))
