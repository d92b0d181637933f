"""`CaptionJob`: everything that is known, and checked, before a cluster is touched. Starts nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ray_ministral.captioning.prompts import PromptTemplate, PromptTokenizer, check_prompt
from ray_ministral.config import CaptionConfig, SamplingConfig
from ray_ministral.data.chat import ChatTokenizer
from ray_ministral.data.fingerprint import fingerprint
from ray_ministral.data.ledger import Ledger
from ray_ministral.data.parts import PartInfo, read_failed_rows
from ray_ministral.data.shards import ShardPlan, plan_shards
from ray_ministral.driver.split import Split
from ray_ministral.driver.summary import CaptionSummary
from ray_ministral.errors import ConfigError
from ray_ministral.model.architecture import Architecture, load_config
from ray_ministral.model.checkpoint import Checkpoint
from ray_ministral.pipeline.partition import stage_parameters

STOP = "stop"


@dataclass(frozen=True)
class CaptionJob:
    """A captioning job that can run: its model, its cut into stages, its shards, its output folder.

    `split` may give way to a measured one when the stages are there; captions do not depend on it.
    `committed` are the parts that earlier runs have written, by name; `failed_rows`, by shard, the rows in them that
    `--retry-failed` does again; `finished` is the summary of a job that has nothing left to do.
    """

    config: CaptionConfig
    model_dir: str
    arch: Architecture
    split: Split
    tokenizer: PromptTokenizer
    plan: ShardPlan
    ledger: Ledger
    committed: Mapping[str, PartInfo]
    failed_rows: Mapping[int, Sequence[int]]
    finished: CaptionSummary | None

    @classmethod
    def plan_job(cls, config: CaptionConfig, *, create: bool = True) -> CaptionJob:
        """Check options, model, input and output against each other; with `create` false, write nothing.

        With `create` true the job has the output folder for itself until its `ledger` is closed. Raises `UsageError`
        (ConfigError, ModelError, InputError) with what to change, `OutputError` for a full disk.
        """
        model_dir = os.path.abspath(config.model)
        hf_config = load_config(model_dir)
        Checkpoint.open(model_dir).check(hf_config)
        arch = Architecture.from_config(hf_config)
        split = Split.before_measuring(config.pipeline, arch)
        tokenizer = PromptTokenizer(model_dir)
        check_prompt(config.prompt, tokenizer)
        _max_prompt_tokens(config, arch)
        plan = plan_shards(
            config.inputs,
            rows_per_shard=config.rows_per_shard,
            limit=config.limit,
            image_column=config.prompt.image_column,
            text_columns=PromptTemplate.of(config.prompt).columns,
            limit_column=config.sampling.max_new_tokens_column,
            columns=config.columns,
            with_token_ids=config.with_token_ids,
        )
        ledger = Ledger.open(config.output, fingerprint(config, plan), create=create)
        try:
            committed = ledger.committed()
            failed_rows = _failed_rows(ledger, plan, committed) if config.retry_failed else {}
            whole = not failed_rows and all(shard.part_name in committed for shard in plan.shards)
            summary = ledger.summary() if ledger.is_finished and whole else None
            if not whole and create:
                ledger.reopen()
            return cls(
                config=config,
                model_dir=model_dir,
                arch=arch,
                split=split,
                tokenizer=tokenizer,
                plan=plan,
                ledger=ledger,
                committed=committed,
                failed_rows=failed_rows,
                finished=None if summary is None else CaptionSummary(**summary),
            )
        except BaseException:
            ledger.close()
            raise

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt, images included, that leaves room for the new tokens."""
        return _max_prompt_tokens(self.config, self.arch)

    @property
    def finish_check(self) -> Callable[[Sequence[int]], str | None]:
        """Whether generated ids end a caption: by an end-of-text token or by one of `--stop`."""
        return partial(finish_reason, sampling=self.config.sampling, tokenizer=self.tokenizer)

    def caption_of(self, generated: Sequence[int]) -> str:
        """The text of generated ids, cut before the first `--stop` text."""
        text = self.tokenizer.decode(generated)
        places = [place for place in (text.find(stop) for stop in self.config.sampling.stop) if place >= 0]
        return text[: min(places)] if places else text

    def image_tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens of a prompt that stand for images of these (height, width)."""
        return sum(self.tokenizer.image_tokens(height, width) for height, width in sizes)

    def describe(self) -> str:
        """The plan for people: input, output, stages with layers, parameters and memory."""
        config, plan = self.config, self.plan
        done = sum(info.rows for info in self.committed.values())
        bytes_each = 2 if config.pipeline.dtype == "bfloat16" else 4
        lines = [
            f"input: {plan.rows} rows of {len(plan.files)} files, in {len(plan.shards)} shards",
            f"columns carried over: {', '.join(plan.carried_columns) or 'none'}",
            f"output: {self.ledger.output}; {len(self.committed)} parts with {done} rows are there already",
            f"model: {self.model_dir}; {self.arch.num_layers} decoder layers, hidden size {self.arch.hidden_size}",
            f"pipeline: {config.pipeline.replicas} x {config.pipeline.stages} stages",
        ]
        if self.split.is_to_be_measured:
            lines.append("  where to cut is measured on the stages when the job starts; what counting FLOPs suggests:")
        kv_tokens = config.pipeline.kv_tokens_per_microbatch * config.pipeline.microbatches
        for index, (stage, share) in enumerate(zip(self.split.partition.stages, self.split.shares, strict=True)):
            parameters = stage_parameters(self.arch, stage)
            cache = kv_tokens * len(stage.layers) * self.arch.kv_elements_per_token_and_layer
            holds = ["vision tower, projector, embedding"] if stage.is_first else []
            holds.append(f"layers {stage.first_layer} to {stage.end_layer - 1}")
            holds += ["output layer"] if stage.is_last else []
            lines.append(
                f"  stage {index}: {', '.join(holds)}; {share:.0%} of the work, {parameters / 1e6:.1f} M parameters, "
                f"{parameters * bytes_each / 1e9:.2f} GB, and at most {cache * bytes_each / 1e9:.2f} GB of KV cache "
                f"(at {bytes_each} bytes a value)"
            )
        return "\n".join(lines)


def _failed_rows(ledger: Ledger, plan: ShardPlan, committed: Mapping[str, PartInfo]) -> dict[int, Sequence[int]]:
    """By shard, the rows of committed parts that have no caption."""
    rows = {
        shard.index: read_failed_rows(ledger.output, shard.part_name)
        for shard in plan.shards
        if shard.part_name in committed and committed[shard.part_name].errors
    }
    return {index: failed for index, failed in rows.items() if failed}


def finish_reason(generated: Sequence[int], *, sampling: SamplingConfig, tokenizer: ChatTokenizer) -> str | None:
    """`stop` where the ids end with an end-of-text token or their text has a stop text, else None."""
    if not sampling.ignore_eos and generated[-1] in tokenizer.eos_token_ids:
        return STOP
    if sampling.stop:
        text = tokenizer.decode(generated)
        if any(stop in text for stop in sampling.stop):
            return STOP
    return None


def _max_prompt_tokens(config: CaptionConfig, arch: Architecture) -> int:
    new = config.sampling.max_new_tokens
    most = min(arch.max_positions - new, config.pipeline.kv_tokens_per_microbatch - new + 1)
    if most < 1:
        raise ConfigError(
            f"--max-new-tokens {new} leaves no room for a prompt: the model has {arch.max_positions} positions and a "
            f"microbatch {config.pipeline.kv_tokens_per_microbatch} tokens of KV cache; use a smaller number"
        )
    return most
