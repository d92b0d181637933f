"""`zero_bubble`: the backward in two halves, B (gradient of the input) and W (of the weights); W fills the bubbles.

After ZB-H1 of "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241): the previous stage waits only for B, so B comes
first, and W, for which nobody waits, comes when the stage would idle or its memory is full. No stage holds the
activations of more microbatches than the first stage of 1F1B does. Here a step ends when all stages are done, so that
paper's ZB-H2, which needs twice the memory and lets steps overlap, would gain nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ray_ministral.pipeline.schedule import Action, Kind, Schedule
from ray_ministral.pipeline.simulator import Durations, seconds_in, simulate

NAME = "zero-bubble"
PATIENCES = (0.0, 0.5, 1.0)
"""Shares of a W for which a stage rather waits than begin the W; none of them is the best for all durations."""


def zero_bubble(
    stages: int,
    microbatches: int,
    *,
    trainable: Sequence[bool] | None = None,
    durations: Durations | None = None,
    memory_limit: int | Sequence[int] | None = None,
) -> Schedule:
    """The shortest of a few candidates by the simulator; of equally short ones the one that holds fewer activations.

    durations: of each stage's one chunk; the default: F, B and W take the same. memory_limit: of how many microbatches
    a stage may hold activations, one number or one a stage; the default is what 1F1B needs on its first stage that has
    a backward. A larger limit helps where stages are uneven or transfers slow. ZB-H1 itself is the first candidate,
    and the best one for even durations.
    """
    bare = Schedule(NAME, stages, 1, microbatches, True, tuple(trainable or (True,) * stages), ())
    times = durations or Durations.uniform(stages)
    limit = max(1, stages - bare.first_trainable_chunk) if memory_limit is None else memory_limit
    limits = (limit,) * stages if isinstance(limit, int) else tuple(limit)
    if len(limits) != stages or min(limits) < 1:
        raise ValueError(f"memory_limit must be at least 1 for each of {stages} stages, got {memory_limit}")
    best: tuple[tuple[float, float], Schedule] | None = None
    for compute in _candidates(bare, times, limits):
        schedule = Schedule.from_compute(NAME, compute, microbatches, bare.trainable, splits_backward=True)
        timeline = simulate(schedule, times)
        cost = (timeline.step_seconds, sum(timeline.peak_activations))
        if best is None or cost < best[0]:
            best = (cost, schedule)
    assert best is not None, "there is always a first candidate"
    return best[1]


def _candidates(bare: Schedule, times: Durations, limits: tuple[int, ...]) -> Iterator[list[list[Action]]]:
    yield _fixed(bare, limits, weights_wait=True)
    # The order of 1F1B with its W directly after each B: where splitting is free, never slower than 1F1B.
    yield _fixed(bare, limits, weights_wait=False)
    for patience in PATIENCES:
        yield _greedy(bare, times, limits, patience)


def _fixed(bare: Schedule, limits: tuple[int, ...], *, weights_wait: bool) -> list[list[Action]]:
    """As many forwards ahead as in 1F1B. In ZB-H1 W then wait: the later the stage, the more W stay behind their B, up
    to the memory that 1F1B needs on its first stage.
    """
    rows: list[list[Action]] = []
    first, total = bare.first_trainable_chunk, bare.num_microbatches
    ahead = total
    for stage, limit in enumerate(limits):
        forward, backward, weight = ([Action(k, m, stage) for m in range(total)] for k in (Kind.F, Kind.B, Kind.W))
        if stage < first:
            rows.append(forward)
            continue
        # Never more ahead than the stage before: it would wait for forwards that wait for its own backward.
        ahead = min(ahead, limit, bare.num_stages - stage)
        behind = min(stage - first, limit - ahead) if weights_wait else 0
        row = forward[:ahead]
        for done in range(total):
            row.append(backward[done])
            if done >= behind:
                row.append(weight[done - behind])
            row.extend(forward[ahead + done : ahead + done + 1])
        rows.append(row + weight[max(0, total - behind) :])
    return rows


class _Progress:
    """What one stage has done in a greedy run, and when it is free again."""

    def __init__(self) -> None:
        self.free: float = 0
        self.done = {Kind.F: 0, Kind.B: 0, Kind.W: 0}
        self.row: list[Action] = []


def _greedy(bare: Schedule, times: Durations, limits: tuple[int, ...], patience: float) -> list[list[Action]]:
    """List scheduling: again and again the stage that can start first does the best it can: B, else F, else W.

    It waits, instead of beginning a W, when its next F or B comes within `patience` times that W.
    """
    total = bare.num_microbatches
    stages = [_Progress() for _ in limits]
    # When the input of an F or B is there. Absent: whoever makes it has not begun.
    ready: dict[Action, float] = {Action(Kind.F, microbatch, 0): 0 for microbatch in range(total)}

    def possible(stage: int, kind: Kind) -> Action | None:
        """The next action of this kind, if it has or will have its input and its memory."""
        done, last = stages[stage].done, bare.last_use(stage)
        action = Action(kind, done[kind], stage)
        if not bare.wants(kind, stage) or done[kind] == total:
            return None
        if kind is Kind.W:
            return action if done[Kind.W] < done[Kind.B] else None
        full = kind is Kind.F and last is not Kind.F and done[Kind.F] - done[last] >= limits[stage]
        return None if full or action not in ready else action

    def choice(stage: int) -> tuple[float, int, Action] | None:
        """When this stage starts what, as things stand; None if it cannot know yet."""
        now = stages[stage].free
        weight = possible(stage, Kind.W)
        # In this order, B comes first of two that could start at the same time.
        coming = [(max(now, ready[a]), a) for kind in (Kind.B, Kind.F) if (a := possible(stage, kind))]
        start, action = min(coming, key=lambda pair: pair[0], default=(None, None))
        if weight and (start is None or (start > now and start - now >= patience * seconds_in(bare, times, weight))):
            return now, stage, weight
        return None if start is None or action is None else (start, stage, action)

    choices = [choice(stage) for stage in range(len(stages))]
    while known := [chosen for chosen in choices if chosen]:
        start, stage, action = min(known)
        end = start + seconds_in(bare, times, action)
        arrival = end + times.transfer * times.factor(action) + 2 * times.handling
        stages[stage].free = end
        stages[stage].done[action.kind] += 1
        stages[stage].row.append(action)
        if action.kind is Kind.F and stage + 1 < len(stages):
            ready[Action(Kind.F, action.microbatch, stage + 1)] = arrival
        elif action.kind is Kind.F:
            ready[Action(Kind.B, action.microbatch, stage)] = end
        elif action.kind is Kind.B and stage > 0:
            ready[Action(Kind.B, action.microbatch, stage - 1)] = arrival
        # Nobody else learned anything new.
        for near in range(max(0, stage - 1), min(stage + 2, len(stages))):
            choices[near] = choice(near)
    return [stage.row for stage in stages]
