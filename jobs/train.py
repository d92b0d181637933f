"""Fine-tune a Ministral 3 that is cut into pipeline stages on Ray.

Options become a `TrainConfig`; `ray_ministral.driver.trainer` does the work; an exception becomes one line on stderr
and an exit status. Options are parsed before anything heavy is imported, so `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    # `python jobs/train.py` puts jobs/ on the path, not the folder above it, where `actors` and the package are.
    sys.path.insert(0, ROOT)

import click  # noqa: E402

from jobs.command import let_local_workers_import_us, log_to_stderr, run_command  # noqa: E402
from ray_ministral import __version__  # noqa: E402
from ray_ministral.config import (  # noqa: E402
    DEFAULT_PROMPT,
    EvalConfig,
    Freezable,
    LearningRateName,
    OptimizerConfig,
    OptimizerName,
    PipelineConfig,
    SampleConfig,
    ScheduleName,
    TrainConfig,
)

if TYPE_CHECKING:
    from ray_ministral.driver.train_result import TrainSummary

Run = Callable[[TrainConfig], "TrainSummary"]


def ray_engine() -> Run:
    """The real engine. Imports Ray, so it is called only after the options have been found good."""
    from functools import partial

    import actors
    from ray_ministral.driver.trainer import train

    return partial(train, train_actor=actors.TrainActor)


def main(arguments: Sequence[str] | None = None, *, engine: Callable[[], Run] = ray_engine) -> int:
    """Run the command line and return its exit status, as `jobs/caption.py` does."""
    return run_command(command, arguments, prog_name="train.py", engine=engine)


@click.command(
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"], "show_default": True},
    help="Fine-tune a Ministral 3 cut into pipeline stages on a Ray cluster, on image-text pairs in parquet.",
    epilog="Exit status: 0 done; 2 wrong options, model or input; 4 the cluster failed for good; 130 interrupted. "
    "After 4 and 130 the same command goes on from its last checkpoint.",
)
@click.option("--model", required=True, metavar="DIR", help="A Hugging Face model directory.")
@click.option(
    "--train", required=True, multiple=True, metavar="PATH", help="Parquet file, folder, glob or URI. May be repeated."
)
@click.option("--eval", metavar="PATH", help="Rows to evaluate on, with the same columns: loss and some captions.")
@click.option("--eval-every", type=int, metavar="N", help="Steps.  [default: with each checkpoint]")
@click.option("--eval-limit", type=int, metavar="N", help="Rows for the loss.  [default: all]")
@click.option(
    "--eval-captions", type=int, metavar="N", default=EvalConfig.captions, help="The first so many whole rows; 0: none."
)
@click.option(
    "--eval-max-new-tokens", type=int, metavar="N", default=EvalConfig.max_new_tokens, help="Longest such caption."
)
@click.option("--output", required=True, metavar="DIR", help="Folder for metrics, checkpoints and the final model.")
@click.option("--image-column", metavar="NAME", default=SampleConfig.image_column, help="As in jobs/caption.py.")
@click.option(
    "--prompt", metavar="TEXT", help=f"Template; {{column}} takes the row's value.  [default: {DEFAULT_PROMPT}]"
)
@click.option("--prompt-column", metavar="NAME", help="Column with a whole prompt per row, instead of --prompt.")
@click.option("--system-prompt", metavar="TEXT", help="System message of every row that brings none.")
@click.option("--response-column", metavar="NAME", help="Column of answers: what is learnt.")
@click.option("--messages-column", metavar="NAME", help="Column of whole conversations, instead of the two.")
@click.option("--stages", type=int, metavar="N", default=PipelineConfig.stages, help="Stages to cut the model into.")
@click.option(
    "--min-stages",
    type=int,
    metavar="N",
    help="Begin, or go on after a loss, with as few as this where there is no room for more.  [default: --stages]",
)
@click.option(
    "--max-stages",
    type=int,
    metavar="N",
    help="Grow to as many as this, one after the other, where there is room.  [default: --stages]",
)
@click.option("--replicas", type=int, metavar="N", default=PipelineConfig.replicas, help="Copies of the pipeline.")
@click.option("--threads-per-stage", type=int, metavar="N", help="CPU threads of a stage.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default=PipelineConfig.device, help="Device.")
@click.option(
    "--schedule", type=click.Choice(get_args(ScheduleName)), default=TrainConfig.schedule, help="Order of the passes."
)
@click.option(
    "--chunks-per-stage",
    type=int,
    metavar="N",
    default=TrainConfig.chunks_per_stage,
    help="For interleaved: 2 on.",
)
@click.option(
    "--global-batch-size", type=int, metavar="N", default=TrainConfig.global_batch_size, help="Samples of a step."
)
@click.option(
    "--microbatch-size",
    type=int,
    metavar="N",
    default=TrainConfig.microbatch_size,
    help="Samples of a microbatch, on average: they are filled evenly by tokens.",
)
@click.option("--steps", type=int, metavar="N", help="Optimizer steps; or give --epochs.")
@click.option("--epochs", type=int, metavar="N", help="Passes over the data; or give --steps.")
@click.option("--seed", type=int, metavar="N", default=TrainConfig.seed, help="Of the order of samples.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default=PipelineConfig.dtype,
    help="Of weights and activations; masters and moments are float32.",
)
@click.option(
    "--optimizer",
    "name",
    type=click.Choice(get_args(OptimizerName)),
    default=OptimizerConfig.name,
    help="muon: for matrices; AdamW for embeddings and the rest.",
)
@click.option("--learning-rate", type=float, metavar="X", default=OptimizerConfig.learning_rate, help="At its peak.")
@click.option("--warmup-steps", type=int, metavar="N", default=OptimizerConfig.warmup_steps, help="Linear warmup.")
@click.option(
    "--lr-schedule",
    type=click.Choice(get_args(LearningRateName)),
    default=OptimizerConfig.lr_schedule,
    help="After the warmup.",
)
@click.option(
    "--weight-decay",
    type=float,
    metavar="X",
    default=OptimizerConfig.weight_decay,
    help="Not on norms and biases.",
)
@click.option(
    "--clip-norm", type=float, metavar="X", default=OptimizerConfig.clip_norm, help="Of all gradients; inf: none."
)
@click.option("--adam-beta1", type=float, metavar="X", default=OptimizerConfig.adam_beta1, help="AdamW.")
@click.option("--adam-beta2", type=float, metavar="X", default=OptimizerConfig.adam_beta2, help="AdamW.")
@click.option("--adam-eps", type=float, metavar="X", default=OptimizerConfig.adam_eps, help="AdamW.")
@click.option(
    "--freeze", type=click.Choice(get_args(Freezable)), multiple=True, help="Part not to train. May be repeated."
)
@click.option("--lora-rank", type=int, metavar="N", help="Train adapters of this rank instead of the weights.")
@click.option("--lora-alpha", type=float, metavar="X", help="Adapters count alpha / rank.  [default: the rank]")
@click.option("--merge-lora", is_flag=True, help="final/ is a whole model with the adapters merged into it.")
@click.option("--max-tokens", type=int, metavar="N", default=TrainConfig.max_tokens, help="Longer samples are skipped.")
@click.option("--recompute", is_flag=True, help="Keep no activations: a third more time, much less memory.")
@click.option(
    "--no-buddy-copies",
    is_flag=True,
    help="Do not keep each stage's trained state outside its process, too, after each step.",
)
@click.option(
    "--max-restarts",
    type=int,
    metavar="N",
    default=PipelineConfig.max_restarts,
    help="Give up after more failures than this in a row without a step getting done.",
)
@click.option(
    "--spares", type=int, metavar="N", default=PipelineConfig.spares, help="Warm processes to stand in for dead stages."
)
@click.option("--checkpoint-every", type=int, metavar="N", help="Steps.  [default: at the end only]")
@click.option(
    "--keep-checkpoints", type=int, metavar="N", default=TrainConfig.keep_checkpoints, help="The newest so many."
)
@click.option(
    "--resume", metavar="auto|never|DIR", default=TrainConfig.resume, help="From the newest good checkpoint, or one."
)
@click.option("--trace", metavar="FILE", help="Write a timeline of all stages for ui.perfetto.dev.")
@click.option("--address", metavar="auto|local|…", default=TrainConfig.address, help="As in jobs/caption.py.")
@click.version_option(__version__, prog_name="ray_ministral")
@click.pass_obj
def command(engine: Callable[[], Run], /, **options: Any) -> None:
    """Make the config from the options and hand it to the engine."""
    evaluation = EvalConfig(
        path=options.pop("eval"),
        **{name: options.pop(f"eval_{name}") for name in ("every", "limit", "captions", "max_new_tokens")},
    )
    parts = {
        kind: {name: options.pop(name) for name in names}
        for kind, names in (
            (
                SampleConfig,
                (
                    "image_column",
                    "prompt",
                    "prompt_column",
                    "system_prompt",
                    "response_column",
                    "messages_column",
                ),
            ),
            (PipelineConfig, ("stages", "replicas", "threads_per_stage", "device", "dtype", "max_restarts", "spares")),
            (
                OptimizerConfig,
                (
                    "name",
                    "learning_rate",
                    "warmup_steps",
                    "lr_schedule",
                    "weight_decay",
                    "clip_norm",
                    "adam_beta1",
                    "adam_beta2",
                    "adam_eps",
                ),
            ),
        )
    }
    config = TrainConfig(
        samples=SampleConfig(**parts[SampleConfig]),
        eval=evaluation,
        pipeline=PipelineConfig(**parts[PipelineConfig]),
        optimizer=OptimizerConfig(**parts[OptimizerConfig]),
        buddy_copies=not options.pop("no_buddy_copies"),
        **options,
    )
    log_to_stderr()
    let_local_workers_import_us(ROOT)
    summary = engine()(config)
    if summary.recoveries:
        click.echo(
            f"recoveries: {summary.recoveries} in {summary.recovery_seconds:.0f} s; "
            f"steps done again: {summary.steps_lost}",
            err=True,
        )
    click.echo(
        f"{summary.steps} steps, last loss {summary.loss}, {summary.tokens_per_second:.0f} tokens/s, "
        f"{summary.skipped_rows} rows skipped; the model is in {summary.output}/final"
    )


if __name__ == "__main__":
    sys.exit(main())
