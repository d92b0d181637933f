"""Makes schedules: GPipe, 1F1B, interleaved 1F1B; and `make_schedule`, which knows them and zero-bubble by name.

Each generator is a pure function from numbers to the order in which stages compute; `Schedule.from_compute` leaves out
what frozen chunks do not need and adds SEND and RECV. In every schedule a chunk's backwards come in ascending order of
microbatches: gradients are then added up in one order, and all schedules give the same bits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, get_args

from ray_ministral.errors import ConfigError
from ray_ministral.pipeline.schedule import Action, Kind, Schedule
from ray_ministral.pipeline.schedule_check import check
from ray_ministral.pipeline.simulator import Durations
from ray_ministral.pipeline.zero_bubble import zero_bubble

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)


def gpipe(stages: int, microbatches: int, *, trainable: Sequence[bool] | None = None) -> Schedule:
    """All forwards, then all backwards (arXiv 1811.06965, there with the backwards in descending order)."""
    compute = []
    for stage in range(stages):
        forward, backward = _of_chunk(stage, microbatches)
        compute.append(forward + backward)
    return Schedule.from_compute("gpipe", compute, microbatches, trainable or (True,) * stages)


def one_f_one_b(stages: int, microbatches: int, *, trainable: Sequence[bool] | None = None) -> Schedule:
    """Backward as soon as possible: each stage runs ahead just so far as it has stages behind it (PipeDream-flush)."""
    compute = []
    for stage in range(stages):
        forward, backward = _of_chunk(stage, microbatches)
        compute.append(_alternate(forward, backward, warmup=stages - stage - 1))
    return Schedule.from_compute("1f1b", compute, microbatches, trainable or (True,) * stages)


def interleaved(
    stages: int, microbatches: int, chunks_per_stage: int, *, trainable: Sequence[bool] | None = None
) -> Schedule:
    """Interleaved 1F1B of Megatron-LM (arXiv 2104.04473): groups of microbatches go through a stage's chunks one after
    the other, which divides the bubble by the number of chunks. With one chunk a stage it is 1F1B.

    Megatron's groups have `stages` microbatches each. A smaller group stalls or deadlocks, so here they are as many,
    as even, and at least so large: what remains is spread over them, and the bubble is the same for any number of
    microbatches from `stages` on. With fewer there is one group.
    """
    count = max(1, microbatches // stages)
    sizes = [microbatches // count + (group < microbatches % count) for group in range(count)]
    groups = [range(sum(sizes[:group]), sum(sizes[: group + 1])) for group in range(count)]
    compute = []
    for stage in range(stages):
        chunks = range(stage, stages * chunks_per_stage, stages)
        forward, backward = (
            [Action(kind, microbatch, chunk) for group in groups for chunk in order for microbatch in group]
            for kind, order in ((Kind.F, chunks), (Kind.B, chunks[::-1]))
        )
        # Twice the stages behind: the same stages are passed again before a microbatch's next chunk is due.
        behind = (stages - stage - 1) * (2 if chunks_per_stage > 1 else 1)
        compute.append(_alternate(forward, backward, warmup=behind + (chunks_per_stage - 1) * sizes[0]))
    trains = trainable or (True,) * (stages * chunks_per_stage)
    return Schedule.from_compute("interleaved", compute, microbatches, trains)


def _of_chunk(chunk: int, microbatches: int) -> tuple[list[Action], list[Action]]:
    forward, backward = ([Action(kind, m, chunk) for m in range(microbatches)] for kind in (Kind.F, Kind.B))
    return forward, backward


def _alternate(forward: list[Action], backward: list[Action], *, warmup: int) -> list[Action]:
    """`warmup` forwards, then one forward and one backward in turn, then the backwards that are left."""
    ahead = min(warmup, len(forward))
    row = forward[:ahead]
    for pair in zip(forward[ahead:], backward, strict=False):
        row.extend(pair)
    return row + backward[len(forward) - ahead :]


def make_schedule(
    name: str,
    stages: int,
    microbatches: int,
    chunks_per_stage: int = 1,
    *,
    first_trainable_chunk: int = 0,
    frozen_chunks: Collection[int] = (),
    durations: Durations | None = None,
    memory_limit: int | None = None,
) -> Schedule:
    """A checked schedule by the name that `--schedule` takes.

    first_trainable_chunk: chunks before it have nothing to train; equal to the number of chunks: forward only, as for
    an evaluation. frozen_chunks: later chunks without anything to train, through which gradients pass. durations and
    memory_limit (in microbatches): for zero-bubble, see there; the other orders do not depend on durations.
    `ConfigError` says which option to change.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"--schedule {name} is not known: use one of {', '.join(SCHEDULES)}")
    for option, number in (
        ("--stages", stages),
        ("--chunks-per-stage", chunks_per_stage),
        ("microbatches", microbatches),
    ):
        if number < 1:
            raise ConfigError(f"{option} must be at least 1, got {number}")
    if name == "interleaved" and chunks_per_stage == 1:
        raise ConfigError(
            "--schedule interleaved needs several chunks a stage, got --chunks-per-stage 1: "
            "use --chunks-per-stage 2 or --schedule 1f1b"
        )
    if name != "interleaved" and chunks_per_stage > 1:
        raise ConfigError(
            f"--schedule {name} has one chunk a stage, got --chunks-per-stage {chunks_per_stage}: "
            "use --chunks-per-stage 1 or --schedule interleaved"
        )
    if memory_limit is not None and (name != "zero-bubble" or memory_limit < 1):
        raise ConfigError(
            f"a memory limit of {memory_limit} microbatches does not fit --schedule {name}: "
            "it must be at least 1, and only zero-bubble keeps to one"
        )
    chunks = stages * chunks_per_stage
    if not 0 <= first_trainable_chunk <= chunks:
        raise ConfigError(f"the first trainable chunk must lie in 0 to {chunks}, got {first_trainable_chunk}")
    if not all(0 <= chunk < chunks for chunk in frozen_chunks):
        raise ConfigError(f"frozen chunks must lie in 0 to {chunks - 1}, got {sorted(frozen_chunks)}")
    if durations is not None and len(durations.forward) != chunks:
        raise ConfigError(f"durations are for {len(durations.forward)} chunks, the schedule has {chunks}")
    trainable = tuple(chunk >= first_trainable_chunk and chunk not in frozen_chunks for chunk in range(chunks))
    match name:
        case "gpipe":
            schedule = gpipe(stages, microbatches, trainable=trainable)
        case "1f1b":
            schedule = one_f_one_b(stages, microbatches, trainable=trainable)
        case "interleaved":
            schedule = interleaved(stages, microbatches, chunks_per_stage, trainable=trainable)
        case _:
            schedule = zero_bubble(
                stages, microbatches, trainable=trainable, durations=durations, memory_limit=memory_limit
            )
    check(schedule)
    return schedule
