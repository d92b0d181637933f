"""What a captioning job did, in numbers: `summary.json` and the table at the end.

Knows neither Ray nor files; the captioner fills it, the ledger writes it, the command line prints it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from ray_ministral.captioning.step_times import StageTotals

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class CaptionSummary:
    """The figures of one captioning job.

    Attributes:
        rows: input rows that have an output row, those of earlier attempts at the same job included.
        ok, errors: how `rows` divides.
        seconds: wall clock of this run, from the call to the last commit.
        startup_seconds: of these, until the first row was admitted to the pipeline.
        images_per_second, generated_tokens_per_second: of this run, from the first admission to the last commit;
            0 when it had nothing left to do.
        stages, replicas: of the pipeline as it was at the end.
        stage_busy: for each stage the fraction of that time, 0 to 1, in which it was in a step; over the replicas, the
            mean.
        recoveries: how often a replica has worked again after it had lost stages.
        recovery_seconds: from the death until then, summed.
        recomputed_tokens: what rows had when they lost their place, and was fed once more.
        output: the output folder.
        status_counts: rows of each `status`.
        startup: what start-up was spent on, in seconds, in order.
        bubble: the fraction of that time, 0 to 1, in which a stage was in no step: 1 - the mean of `stage_busy`.
        steps: of all microbatches of all replicas.
        tokens_per_step: the mean: one for each decoding sequence, and those of the prompts that enter.
        model_seconds: for each stage, of the time in steps, what went to the model, sampling included; over the
            replicas, the mean.
        outside_seconds: for each stage the rest of the time in steps: wire, KV cache, plan, pixels.
        layers_per_stage, estimated_share: decoder layers of each stage, and the fraction of all work that it was
            expected to have.
        split_by: who has cut the model there: `given`, `measured` or `flops`; see `split.Split`.
    """

    rows: int
    ok: int
    errors: int
    seconds: float
    startup_seconds: float
    images_per_second: float
    generated_tokens_per_second: float
    stages: int
    replicas: int
    stage_busy: list[float]
    recoveries: int
    output: str
    status_counts: dict[str, int] = field(default_factory=dict)
    startup: dict[str, float] = field(default_factory=dict)
    bubble: float = 0.0
    steps: int = 0
    tokens_per_step: float = 0.0
    model_seconds: list[float] = field(default_factory=list)
    outside_seconds: list[float] = field(default_factory=list)
    layers_per_stage: list[int] = field(default_factory=list)
    estimated_share: list[float] = field(default_factory=list)
    split_by: str = ""
    recovery_seconds: float = 0.0
    recomputed_tokens: int = 0

    def __post_init__(self) -> None:
        # The summary is what people believe: better no summary than one that does not add up.
        if self.ok + self.errors != self.rows:
            raise ValueError(f"{self.ok} rows ok and {self.errors} errors do not make {self.rows} rows")
        if self.status_counts and sum(self.status_counts.values()) != self.rows:
            raise ValueError(f"the counts of each status, {self.status_counts}, do not make {self.rows} rows")

    def to_json(self) -> dict[str, object]:
        """The content of `summary.json`: plain numbers, strings, lists and dictionaries."""
        return asdict(self)


@dataclass(frozen=True)
class StageFigures:
    """What the stages did between the first admission and the last commit; names as in `CaptionSummary`."""

    stage_busy: list[float]
    bubble: float
    steps: int
    tokens_per_step: float
    model_seconds: list[float]
    outside_seconds: list[float]

    @classmethod
    def of(cls, replicas: Sequence[Sequence[StageTotals]], num_stages: int, seconds: float) -> StageFigures:
        """From the sums of each stage of each replica; 0 everywhere in a run that had nothing left to do."""
        replicas = replicas or [[StageTotals()] * num_stages]
        stages = list(zip(*replicas, strict=True))
        busy = [_mean([totals.busy_seconds for totals in stage]) / seconds if seconds else 0.0 for stage in stages]
        steps = sum(totals.steps for totals in stages[0])
        return cls(
            stage_busy=busy,
            bubble=1 - _mean(busy) if seconds else 0.0,
            steps=steps,
            tokens_per_step=sum(totals.tokens for totals in stages[0]) / steps if steps else 0.0,
            model_seconds=[_mean([totals.model_seconds for totals in stage]) for stage in stages],
            outside_seconds=[_mean([totals.outside_seconds for totals in stage]) for stage in stages],
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def as_table(summary: CaptionSummary) -> Table:
    """The summary for people, as a two-column table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Captioning", box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    # Folding keeps a long output path whole: it is there to be copied.
    table.add_column(overflow="fold")
    for name, value in _lines(summary):
        # Text, not str: a bracket in a path is no markup.
        table.add_row(name, Text(value))
    return table


def _lines(summary: CaptionSummary) -> Iterator[tuple[str, str]]:
    yield "rows", f"{summary.rows}: {summary.ok} ok, {summary.errors} errors"
    failed = {status: count for status, count in summary.status_counts.items() if status != "ok" and count}
    if failed:
        yield "errors", ", ".join(f"{status} {count}" for status, count in sorted(failed.items()))
    yield "time", f"{summary.seconds:.1f} s, of which start-up {summary.startup_seconds:.1f} s"
    if summary.startup:
        yield "start-up", ", ".join(f"{step} {seconds:.1f} s" for step, seconds in summary.startup.items())
    yield "speed", f"{summary.images_per_second:.2f} images/s, {summary.generated_tokens_per_second:.1f} tokens/s"
    yield "pipeline", f"{summary.stages} stages, {summary.replicas} replicas, {summary.recoveries} recoveries"
    if summary.layers_per_stage:
        shares = ", ".join(f"{share:.0%}" for share in summary.estimated_share)
        yield "layers", f"{' + '.join(map(str, summary.layers_per_stage))} ({summary.split_by}), estimated {shares}"
    if summary.stage_busy:
        yield "stages busy", ", ".join(f"{fraction:.0%}" for fraction in summary.stage_busy)
    if summary.steps:
        yield "bubble", f"{summary.bubble:.0%}"
        yield "steps", f"{summary.steps}, of {summary.tokens_per_step:.1f} tokens on average"
        yield "in the model", ", ".join(f"{seconds:.2f} s" for seconds in summary.model_seconds)
        yield "around it", ", ".join(f"{seconds:.2f} s" for seconds in summary.outside_seconds)
    yield "output", summary.output
