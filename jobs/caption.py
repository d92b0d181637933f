"""Caption the images of parquet files with a Ministral 3 that is cut into pipeline stages on Ray.

Options become a `CaptionConfig`; `ray_ministral.driver.captioner` does the work; an exception becomes one line on
stderr and an exit status. Options are parsed before anything heavy is imported, so `--help` answers at once.

Works as `python jobs/caption.py`, `python -m jobs.caption`, and in `ray job submit --working-dir . -- python …`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    # `python jobs/caption.py` puts jobs/ on the path, not the folder above it, where `actors` and the package are.
    sys.path.insert(0, ROOT)

import click  # noqa: E402

from jobs.command import let_local_workers_import_us, log_to_stderr, run_command  # noqa: E402
from ray_ministral import __version__  # noqa: E402
from ray_ministral.config import (  # noqa: E402
    DEFAULT_PROMPT,
    CaptionConfig,
    ImageLimits,
    PipelineConfig,
    PromptConfig,
    SamplingConfig,
)

if TYPE_CHECKING:
    from ray_ministral.driver.summary import CaptionSummary


@dataclass(frozen=True)
class Engine:
    """What the command line calls: a seam, so that its tests need neither Ray nor a model."""

    run: Callable[[CaptionConfig], CaptionSummary]
    describe: Callable[[CaptionConfig], str]


def ray_engine() -> Engine:
    """The real engine. Imports Ray, so it is called only after the options have been found good."""
    import actors
    from ray_ministral.driver.captioner import caption, describe

    return Engine(run=partial(caption, stage_actor=actors.StageActor), describe=describe)


def main(arguments: Sequence[str] | None = None, *, engine: Callable[[], Engine] = ray_engine) -> int:
    """Run the command line and return its exit status.

    0 done, 2 wrong options, model or input, 3 too many row errors, 4 the cluster failed for good, 130 interrupted. A
    bug keeps its traceback (and Python's status 1).
    """
    return run_command(command, arguments, prog_name="caption.py", engine=engine)


@click.command(
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"], "show_default": True},
    help="Caption the images of parquet files with a Ministral 3 cut into pipeline stages on a Ray cluster.",
    epilog=(
        "Exit status: 0 done; 2 wrong options, model or input; 3 too many row errors; 4 the cluster failed for good; "
        "130 interrupted. After 3, 4 and 130 the same command goes on where it stopped."
    ),
)
@click.option("--model", required=True, metavar="DIR", help="A Hugging Face model directory.")
@click.option(
    "--input",
    "inputs",
    required=True,
    multiple=True,
    metavar="PATH",
    help="Parquet file, folder, glob or filesystem URI. May be repeated.",
)
@click.option("--output", required=True, metavar="DIR", help="Folder for the parts, the job's record and the summary.")
@click.option(
    "--image-column",
    metavar="NAME",
    default=PromptConfig.image_column,
    help="Column of encoded bytes, of {bytes, path} as the `datasets` library writes it, or of lists of either.",
)
@click.option(
    "--prompt",
    metavar="TEXT",
    help=f"A template; {{column}} takes the row's value.  [default without --prompt-column: {DEFAULT_PROMPT}]",
)
@click.option("--prompt-column", metavar="NAME", help="Column with a whole prompt per row, instead of --prompt.")
@click.option("--system-prompt", metavar="TEXT", help="System message of every row.")
@click.option("--stages", type=int, metavar="N", default=PipelineConfig.stages, help="Stages to cut the model into.")
@click.option("--replicas", type=int, metavar="N", default=PipelineConfig.replicas, help="Copies of the pipeline.")
@click.option(
    "--threads-per-stage",
    type=int,
    metavar="N",
    help="CPU threads of a stage.  [default: the cluster's cores divided among the stages]",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default=PipelineConfig.device, help="Device.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default=PipelineConfig.dtype,
    help="Type of weights and activations.",
)
@click.option(
    "--max-new-tokens",
    type=int,
    metavar="N",
    default=SamplingConfig.max_new_tokens,
    help="Longest caption, in tokens.",
)
@click.option(
    "--max-new-tokens-column", metavar="NAME", help="Column with a shorter limit per row; null: --max-new-tokens."
)
@click.option(
    "--temperature", type=float, metavar="X", default=SamplingConfig.temperature, help="0 always takes the likeliest."
)
@click.option("--top-k", type=int, metavar="N", help="Sample from the N likeliest tokens only.")
@click.option("--top-p", type=float, metavar="X", help="Sample from the likeliest tokens that make up X only.")
@click.option(
    "--seed",
    type=int,
    metavar="N",
    default=SamplingConfig.seed,
    help="A row's caption depends on it and on the row's place, never on its neighbours.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End a caption before this text. May be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on to --max-new-tokens, for measurements.")
@click.option(
    "--rows-per-shard",
    type=int,
    metavar="N",
    default=CaptionConfig.rows_per_shard,
    help="Rows of a part: the unit of resuming.",
)
@click.option("--limit", type=int, metavar="N", help="Caption the first N rows only.")
@click.option(
    "--columns",
    multiple=True,
    metavar="NAME",
    help="Column to carry over. May be repeated.  [default: all but the image]",
)
@click.option("--with-token-ids", is_flag=True, help="Add the column token_ids: the generated ids.")
@click.option(
    "--max-image-pixels",
    type=int,
    metavar="N",
    default=ImageLimits.max_pixels,
    help="Refuse larger images, from their header.",
)
@click.option(
    "--max-error-rate",
    type=float,
    metavar="X",
    default=CaptionConfig.max_error_rate,
    help="Give up above this share of failed rows.",
)
@click.option("--retry-failed", is_flag=True, help="On a resume, do the failed rows again.")
@click.option(
    "--max-restarts",
    type=int,
    metavar="N",
    default=PipelineConfig.max_restarts,
    help="Give up a pipeline whose stages die more often in a row without a row getting done.",
)
@click.option(
    "--spares", type=int, metavar="N", default=PipelineConfig.spares, help="Warm processes to stand in for dead stages."
)
@click.option("--trace", metavar="FILE", help="Write a timeline of driver and stages for ui.perfetto.dev.")
@click.option("--dry-run", is_flag=True, help="Print the plan and start nothing.")
@click.option(
    "--address",
    metavar="auto|local|…",
    default=CaptionConfig.address,
    help="auto: the cluster that runs here (in `ray job submit` its own), else local; local: one for this job alone.",
)
@click.version_option(__version__, prog_name="ray_ministral")
@click.pass_obj
def command(
    engine: Callable[[], Engine],
    /,
    *,
    model: str,
    inputs: tuple[str, ...],
    output: str,
    image_column: str,
    prompt: str | None,
    prompt_column: str | None,
    system_prompt: str | None,
    stages: int,
    replicas: int,
    threads_per_stage: int | None,
    device: Any,
    dtype: Any,
    max_new_tokens: int,
    max_new_tokens_column: str | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop: tuple[str, ...],
    ignore_eos: bool,
    rows_per_shard: int,
    limit: int | None,
    columns: tuple[str, ...],
    with_token_ids: bool,
    max_image_pixels: int,
    max_error_rate: float,
    retry_failed: bool,
    max_restarts: int,
    spares: int,
    trace: str | None,
    dry_run: bool,
    address: str,
) -> None:
    """Make the config from the options and hand it to the engine."""
    config = CaptionConfig(
        model=model,
        inputs=inputs,
        output=output,
        prompt=PromptConfig(
            image_column=image_column, prompt=prompt, prompt_column=prompt_column, system_prompt=system_prompt
        ),
        sampling=SamplingConfig(
            max_new_tokens=max_new_tokens,
            max_new_tokens_column=max_new_tokens_column,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
        ),
        pipeline=PipelineConfig(
            stages=stages,
            replicas=replicas,
            threads_per_stage=threads_per_stage,
            device=device,
            dtype=dtype,
            max_restarts=max_restarts,
            spares=spares,
        ),
        images=ImageLimits(max_pixels=max_image_pixels),
        rows_per_shard=rows_per_shard,
        limit=limit,
        columns=columns or None,
        with_token_ids=with_token_ids,
        max_error_rate=max_error_rate,
        retry_failed=retry_failed,
        trace=trace,
        address=address,
    )
    log_to_stderr()
    let_local_workers_import_us(ROOT)
    if dry_run:
        click.echo(engine().describe(config))
    else:
        _print_summary(engine().run(config))


def _print_summary(summary: CaptionSummary) -> None:
    from rich.console import Console

    from ray_ministral.driver.summary import as_table

    Console().print(as_table(summary))


if __name__ == "__main__":
    sys.exit(main())
