"""`TrainJob`: what is known of a training job, and checked, before a cluster is touched. Starts nothing."""

from __future__ import annotations

import datetime
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_ministral.config import PromptConfig, TrainConfig
from ray_ministral.data.row_reader import RowIndex
from ray_ministral.errors import ConfigError
from ray_ministral.model.architecture import Architecture, load_config
from ray_ministral.model.checkpoint import Checkpoint
from ray_ministral.pipeline.generators import make_schedule
from ray_ministral.pipeline.partition import Costs, Partition
from ray_ministral.training.checkpoint import TrainState, latest_good, read_state
from ray_ministral.training.order import SampleOrder, order_state, plan_order
from ray_ministral.training.packing import num_microbatches
from ray_ministral.training.rates import LearningRate
from ray_ministral.training.samples import SampleOptions, load_tokenizer, plan_samples

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
PINNED = ("train", "samples", "global_batch_size", "seed", "max_tokens", "freeze", "lora_rank")
"""What a resumed run must share with the one that it goes on with, or its curve would be another."""


@dataclass(frozen=True)
class TrainJob:
    """A training job that can run. Steps are counted from 0; `first_step` is what the checkpoint has done already."""

    config: TrainConfig
    model_dir: str
    output: Path
    arch: Architecture
    chunks: Partition
    sample_options: SampleOptions
    rows: RowIndex
    order: SampleOrder
    total_steps: int
    learning_rate: LearningRate
    resume_from: Path | None
    first_step: int

    @classmethod
    def plan_job(cls, config: TrainConfig) -> TrainJob:
        """Check options, model, data and checkpoints against each other. Raises `UsageError` with what to change."""
        model_dir = os.path.abspath(config.model)
        hf_config = load_config(model_dir)
        Checkpoint.open(model_dir).check(hf_config)
        arch = Architecture.from_config(hf_config)
        stages, per_stage = config.pipeline.stages, config.chunks_per_stage
        if stages * per_stage > arch.num_layers:
            raise ConfigError(
                f"{stages} stages of {per_stage} chunks for {arch.num_layers} decoder layers: every chunk needs a "
                "layer, use fewer --stages or --chunks-per-stage"
            )
        chunks = Partition.balanced(Costs.from_flops(arch), stages * per_stage)
        microbatches = num_microbatches(config.global_batch_size, config.microbatch_size)
        make_schedule(config.schedule, stages, -(-microbatches // config.pipeline.replicas), per_stage)
        output = Path(os.path.abspath(config.output))
        resume_from = _checkpoint_to_resume(config, output)
        date, first_step = datetime.datetime.now().astimezone().date(), 0
        held_order = None
        if resume_from is not None:
            state = read_state(resume_from)
            _refuse_another_run(state, config, resume_from)
            held_order = state.config
            date, first_step = datetime.date.fromisoformat(state.config["date"]), state.step
        options = SampleOptions(
            date=date,
            model_dir=model_dir,
            max_tokens=min(config.max_tokens, arch.max_positions),
            prompt=PromptConfig(image_column=config.samples.image_column, prompt_column=config.samples.prompt_column),
            response_column=config.samples.response_column,
            messages_column=config.samples.messages_column,
        )
        load_tokenizer(options)  # for its refusals: of the chat template, of the prompt
        rows = plan_samples(config.train, options)
        order = plan_order(rows.group_rows, rows.shard_bytes, config.seed, held_order)
        total = (
            config.steps if config.steps is not None else order.num_steps(config.epochs or 1, config.global_batch_size)
        )
        optimizer = config.optimizer
        return cls(
            config=config,
            model_dir=model_dir,
            output=output,
            arch=arch,
            chunks=chunks,
            sample_options=options,
            rows=rows,
            order=order,
            total_steps=total,
            learning_rate=LearningRate(optimizer.learning_rate, optimizer.warmup_steps, total, optimizer.lr_schedule),
            resume_from=resume_from,
            first_step=first_step,
        )

    def state(self, steps_done: int) -> TrainState:
        """What a checkpoint after so many steps says besides tensors."""
        cursor = self.order.cursor_at(steps_done, self.config.global_batch_size)
        date = self.sample_options.date
        assert date is not None, "plan_job sets it"
        # Chat templates may say today's date: a resumed run goes on with the day of its start.
        held = pinned(self.config) | {"date": date.isoformat()} | order_state(self.rows.group_rows, self.order)
        return TrainState(steps_done, self.config.seed, asdict(cursor), held)


def pinned(config: TrainConfig) -> dict[str, Any]:
    """What decides which samples a step has and what is trained, as plain JSON."""
    values = asdict(config)
    return {name: _plain(values[name]) for name in PINNED}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _checkpoint_to_resume(config: TrainConfig, output: Path) -> Path | None:
    if config.resume == "never":
        return None
    if config.resume != "auto":
        path = Path(os.path.abspath(config.resume))
        if not path.is_dir():
            raise ConfigError(f"--resume {config.resume} is no folder: give auto, never or a checkpoint's folder")
        return path
    folder = output / CHECKPOINTS
    if not folder.is_dir():
        return None
    found = latest_good(folder)
    for skipped in found.skipped:
        logger.warning("a checkpoint cannot be used: %s", skipped)
    return found.checkpoint


def _refuse_another_run(state: TrainState, config: TrainConfig, path: Path) -> None:
    now = pinned(config)
    different = [
        f"{name}: {state.config[name]} -> {now[name]}"
        for name in now
        if name in state.config and state.config[name] != now[name]
    ]
    if different:
        raise ConfigError(
            f"{path} belongs to another run: {'; '.join(different)}: run the same command to go on with it, give "
            "another --output, or --resume never"
        )
