"""`TrainJob`: what is known of a training job, and checked, before a cluster is touched. Starts nothing."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_ministral.config import PromptConfig, TrainConfig
from ray_ministral.data.row_reader import RowIndex
from ray_ministral.driver.train_resume import (
    checkpoint_to_resume,
    pinned,
    refuse_another_run,
    refuse_to_mix_runs,
    usable_folder,
)
from ray_ministral.errors import ConfigError
from ray_ministral.model.architecture import Architecture, load_config
from ray_ministral.model.checkpoint import Checkpoint
from ray_ministral.pipeline.generators import make_schedule
from ray_ministral.pipeline.partition import Costs, Partition
from ray_ministral.training.checkpoint import TrainState, read_state
from ray_ministral.training.costs import training_costs
from ray_ministral.training.order import SampleOrder, order_state, plan_order
from ray_ministral.training.packing import num_microbatches
from ray_ministral.training.rates import LearningRate
from ray_ministral.training.samples import SampleOptions, load_tokenizer, plan_samples
from ray_ministral.training.targets import ConversationTokenizer, TrainSample


@dataclass(frozen=True)
class TrainJob:
    """A training job that can run. Steps are counted from 0; `first_step` is what the checkpoint has done already.

    `eval_rows` are those to evaluate on, None for no evaluation. `held` is what a run that goes on must share.
    """

    config: TrainConfig
    model_dir: str
    output: Path
    arch: Architecture
    sample_options: SampleOptions
    tokenizer: ConversationTokenizer
    rows: RowIndex
    eval_rows: RowIndex | None
    order: SampleOrder
    total_steps: int
    learning_rate: LearningRate
    held: dict[str, Any]
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
        for option, number in (("--stages", stages), ("--max-stages", config.max_stages or stages)):
            if number * per_stage > arch.num_layers:
                raise ConfigError(
                    f"{option} {number} with {per_stage} chunks a stage for {arch.num_layers} decoder layers: every "
                    f"chunk needs a layer, use at most {arch.num_layers // per_stage} stages, or fewer "
                    "--chunks-per-stage"
                )
        microbatches = num_microbatches(config.global_batch_size, config.microbatch_size)
        make_schedule(config.schedule, stages, -(-microbatches // config.pipeline.replicas), per_stage)
        output = usable_folder(config.output)
        resume_from = checkpoint_to_resume(config, output)
        state = None if resume_from is None else read_state(resume_from)
        first_step = 0 if state is None else state.step
        refuse_to_mix_runs(output, resume_from, first_step)
        today = datetime.datetime.now().astimezone().date()
        samples = config.samples
        options = SampleOptions(
            date=today if state is None else datetime.date.fromisoformat(state.config["date"]),
            model_dir=model_dir,
            max_tokens=min(config.max_tokens, arch.max_positions),
            prompt=PromptConfig(
                image_column=samples.image_column,
                prompt=samples.prompt,
                prompt_column=samples.prompt_column,
                system_prompt=samples.system_prompt,
            ),
            response_column=samples.response_column,
            messages_column=samples.messages_column,
        )
        tokenizer = load_tokenizer(options)
        rows = plan_samples(config.train, options)
        held = pinned(config, model_dir)
        if state is not None:
            refuse_another_run(state, held, f"{resume_from}")
        eval_rows = None if config.eval.path is None else plan_samples([config.eval.path], options, option="--eval")
        order = plan_order(rows.group_rows, rows.shard_bytes, config.seed, None if state is None else state.config)
        total = (
            config.steps if config.steps is not None else order.num_steps(config.epochs or 1, config.global_batch_size)
        )
        config.require_warmup_within(total)
        if first_step > total:
            raise ConfigError(
                f"{resume_from} has done {first_step} steps, more than the {total} of this run: raise --steps or "
                "--epochs to go on, or give another --output"
            )
        optimizer = config.optimizer
        return cls(
            config=config,
            model_dir=model_dir,
            output=output,
            arch=arch,
            sample_options=options,
            tokenizer=tokenizer,
            rows=rows,
            eval_rows=eval_rows,
            order=order,
            total_steps=total,
            learning_rate=LearningRate(optimizer.learning_rate, optimizer.warmup_steps, total, optimizer.lr_schedule),
            held=held | order_state(rows.group_rows, order),
            resume_from=resume_from,
            first_step=first_step,
        )

    def chunks(self, stages: int, samples: Sequence[TrainSample]) -> Partition:
        """The cut of the model for so many stages, by what `samples` cost; of none, by what a usual request does."""
        config = self.config
        if samples:
            costs = training_costs(self.arch, samples, config.freeze, adapters=config.lora_rank is not None)
        else:
            costs = Costs.from_flops(self.arch)
        return Partition.balanced(costs, stages * config.chunks_per_stage)

    def state(self, steps_done: int) -> TrainState:
        """What a checkpoint after so many steps says besides tensors."""
        cursor = self.order.cursor_at(steps_done, self.config.global_batch_size)
        date = self.sample_options.date
        assert date is not None, "plan_job sets it"
        # Chat templates may say today's date: a resumed run goes on with the day of its start.
        return TrainState(steps_done, self.config.seed, asdict(cursor), self.held | {"date": date.isoformat()})
