"""Prints and compares schedules for given stages, microbatches and durations: `python -m …pipeline.schedule`.

Costs are given per stage; with several chunks a stage, each chunk takes its share, so the schedules do the same work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ray_ministral.errors import ConfigError
from ray_ministral.pipeline.generators import SCHEDULES, make_schedule
from ray_ministral.pipeline.schedule import Schedule
from ray_ministral.pipeline.schedule_check import check
from ray_ministral.pipeline.schedule_grid import render
from ray_ministral.pipeline.simulator import Durations, Timeline, simulate


def main(argv: Sequence[str] | None = None) -> int:
    """Print the grids and the table; 0, or 2 (through argparse) for options that do not fit."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        text = report(options)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(text + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ray_ministral.pipeline.schedule",
        description="Print pipeline schedules as grids and compare their step time, bubble and peak activations.",
    )

    def numbers(option: str, default: list[float] | None, text: str) -> None:
        parser.add_argument(option, type=float, nargs="+", default=default, metavar="X", help=text)

    parser.add_argument("--stages", type=int, default=4, metavar="N")
    parser.add_argument("--microbatches", type=int, default=8, metavar="N")
    parser.add_argument(
        "--chunks-per-stage", type=int, default=2, metavar="N", help="of interleaved; the others have 1"
    )
    numbers("--forward", [1.0], "of a microbatch; one for all stages, or one a stage")
    numbers("--backward", [2.0], "the whole backward, weights included")
    numbers("--weight", [1.0], "the part of the backward that W takes")
    parser.add_argument("--transfer", type=float, default=0.0, metavar="X", help="from a SEND to the message's arrival")
    parser.add_argument(
        "--handling", type=float, default=0.0, metavar="X", help="a stage is busy in each SEND and RECV"
    )
    numbers("--microbatch-scale", None, "how much longer than usual each microbatch takes")
    parser.add_argument("--memory-limit", type=int, metavar="N", help="zero-bubble: microbatches a stage may hold")
    parser.add_argument("--schedule", choices=SCHEDULES, action="append", help="only this one; may be repeated")
    parser.add_argument("--width", type=int, default=100, metavar="N", help="columns of the grids drawn to scale")
    return parser


def report(options: argparse.Namespace) -> str:
    """The whole text; `ConfigError` or `ValueError` for options that do not fit."""
    if options.chunks_per_stage < 1:
        raise ConfigError(f"--chunks-per-stage must be at least 1, got {options.chunks_per_stage}")
    parts = []
    timelines = []
    for name in options.schedule or SCHEDULES:
        chunks = options.chunks_per_stage if name == "interleaved" else 1
        if name == "interleaved" and chunks == 1 and not options.schedule:
            continue
        times = _durations(options, chunks)
        schedule = make_schedule(
            name,
            options.stages,
            options.microbatches,
            chunks,
            durations=times,
            memory_limit=options.memory_limit if name == "zero-bubble" else None,
        )
        # A chunk holds its share of what a microbatch leaves on a stage, so peaks compare, too.
        timelines.append(simulate(schedule, times, activations=[1 / chunks] * schedule.num_chunks))
        parts += [f"{_title(schedule)}\n{render(schedule)}\n\n{render(timelines[-1], options.width)}\n"]
    return "\n".join([*parts, _table(timelines)])


def _durations(options: argparse.Namespace, chunks_per_stage: int) -> Durations:
    def shares(option: str) -> list[float]:
        numbers = getattr(options, option)
        if len(numbers) not in {1, options.stages}:
            raise ConfigError(
                f"--{option} takes one number or one for each of {options.stages} stages, got {len(numbers)}"
            )
        per_stage = numbers * options.stages if len(numbers) == 1 else numbers
        return [number / chunks_per_stage for number in per_stage] * chunks_per_stage

    times = Durations.per_chunk(
        shares("forward"),
        shares("backward"),
        shares("weight"),
        transfer=options.transfer,
        handling=options.handling,
    )
    scale = options.microbatch_scale
    if scale is None:
        return times
    if len(scale) != options.microbatches:
        raise ConfigError(
            f"--microbatch-scale takes {options.microbatches} numbers, one a microbatch, got {len(scale)}"
        )
    return times.scaled(scale)


def _title(schedule: Schedule) -> str:
    chunks = f", {schedule.chunks_per_stage} chunks a stage" if schedule.chunks_per_stage > 1 else ""
    return f"{schedule.name}: {schedule.num_stages} stages, {schedule.num_microbatches} microbatches{chunks}"


def _table(timelines: Sequence[Timeline]) -> str:
    rows = [("schedule", "step", "bubble", "peak activations (microbatches, each stage)", "blocking sends")]
    for timeline in timelines:
        stuck = check(timeline.schedule).rendezvous_stuck
        peaks = " ".join(f"{peak:.3g}" for peak in timeline.peak_activations)
        bubble = f"{timeline.bubble:.1%}"
        rows.append(
            (timeline.schedule.name, f"{timeline.step_seconds:.4g}", bubble, peaks, "stuck" if stuck else "fine")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip() for row in rows
    )
