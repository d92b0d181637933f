"""Captions through `CaptionStage`s chained by hand in one process, and by Hugging Face's `generate`.

What Ray and the driver do in a job is a random order of steps here: any stage may work on any microbatch next.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_ministral.captioning.batching import BatchScheduler, Launch, Request
from ray_ministral.captioning.plan import StepPlan
from ray_ministral.captioning.request import Pixels
from ray_ministral.captioning.stage import CaptionStage
from ray_ministral.config import SamplingConfig, StageOptions
from ray_ministral.pipeline.partition import Partition
from tests.parity.small_models import PAD_TOKEN, Row, pad_images, pad_rows, quiet_transformers

BLOCK_ROWS = 4
"""Rows that share a pixel block, as rows of one chunk do."""


@dataclass
class Run:
    """Generated ids and finish reason by row, and what happened on the way."""

    captions: list[list[int]]
    reasons: list[str]
    plans: list[StepPlan] = field(default_factory=list)

    @property
    def moves(self) -> int:
        return sum(len(plan.moves) for plan in self.plans)


def make_stages(
    folder: Path, split: Sequence[int], sampling: SamplingConfig, *, kv_tokens: int = 4096, dtype: Any = "float32"
) -> list[CaptionStage]:
    stages = []
    for spec in Partition.from_layers(split, sum(split)).stages:
        stage = CaptionStage(StageOptions(str(folder), spec, dtype=dtype), sampling, kv_tokens)
        stage.load()
        stages.append(stage)
    return stages


def run_step(stages: Sequence[CaptionStage], plan: StepPlan, blocks: Sequence[Pixels] = ()) -> np.ndarray:
    """One step through all stages, one after the other; the sampled tokens."""
    output = stages[0].step(plan, None, *blocks)
    for stage in stages[1:]:
        output = stage.step(plan.without_token_ids(), read_only(output))
    return output


def read_only(array: np.ndarray) -> np.ndarray:
    """As arrays come out of an object store."""
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def caption(
    folder: Path,
    rows: Sequence[Row],
    *,
    split: Sequence[int] = (4,),
    sampling: SamplingConfig | None = None,
    stop_ids: Sequence[int] = (),
    microbatches: int | None = None,
    rows_per_microbatch: int = 32,
    kv_tokens: int = 4096,
    tokens_per_step: int = 8192,
    keys: Sequence[int] | None = None,
    order_seed: int = 0,
) -> Run:
    """Caption `rows`; those of them that fit at once are offered to the scheduler little by little."""
    sampling = sampling or SamplingConfig(max_new_tokens=12)
    stages = make_stages(folder, split, sampling, kv_tokens=kv_tokens)
    scheduler = BatchScheduler(
        microbatches=microbatches or len(split) + 1,
        rows_per_microbatch=rows_per_microbatch,
        kv_tokens_per_microbatch=kv_tokens,
        tokens_per_step=tokens_per_step,
        finish_check=lambda generated: "stop" if generated[-1] in stop_ids else None,
    )
    blocks: dict[int, Pixels] = {}
    for index, row in enumerate(rows):
        blocks.setdefault(index // BLOCK_ROWS, []).append([read_only(image) for image in row.images])
    chance = random.Random(order_seed)
    run = Run([[] for _ in rows], ["" for _ in rows])
    coming = list(range(len(rows)))
    under_way: list[tuple[Launch, int, np.ndarray | None]] = []  # the stage that comes next, and what it gets
    while coming or not scheduler.idle:
        for index in coming[: chance.randint(1, 6)]:
            row = rows[index]
            scheduler.add(
                Request(
                    key=index,
                    token_ids=row.token_ids.numpy().astype(np.int32),
                    max_new_tokens=sampling.max_new_tokens,
                    sample_key=keys[index] if keys is not None else index,
                    pixels=(index // BLOCK_ROWS, index % BLOCK_ROWS) if row.images else None,
                )
            )
            coming.remove(index)
        under_way += [(launch, 0, None) for launch in scheduler.launches()]
        launch, stage, hidden = under_way.pop(chance.randrange(len(under_way)))
        plan = launch.plan if stage == 0 else launch.plan.without_token_ids()
        pixels = [blocks[block] for block in launch.blocks] if stage == 0 else []
        output = stages[stage].step(plan, None if hidden is None else read_only(hidden), *pixels)
        if stage + 1 < len(stages):
            under_way.append((launch, stage + 1, output))
            continue
        run.plans.append(launch.plan)
        for finished in scheduler.complete(launch.plan, output):
            assert not run.reasons[finished.request.key], "a row finished twice"
            run.captions[finished.request.key] = list(finished.request.generated)
            run.reasons[finished.request.key] = finished.finish_reason
    assert all(run.reasons)
    return run


def generate(
    model: Any, rows: Sequence[Row], *, max_new_tokens: int = 12, stop_ids: Sequence[int] = (), batch: bool = False
) -> list[list[int]]:
    """Hugging Face's greedy captions, row by row or as one left-padded batch."""
    groups = [list(rows)] if batch else [[row] for row in rows]
    captions: list[list[int]] = []
    for group in groups:
        padded = pad_rows(group, "left")
        with quiet_transformers(), torch.no_grad():
            output = model.generate(
                input_ids=padded.input_ids,
                attention_mask=padded.attention_mask,
                **padded.images,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=list(stop_ids) or None,
                pad_token_id=PAD_TOKEN,
            )
        generated = output[:, padded.input_ids.shape[1] :].tolist()
        captions += [until_stop(ids, stop_ids) for ids in generated]
    return captions


def until_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """Up to and with the first stop id."""
    end = next((place + 1 for place, id_ in enumerate(ids) if id_ in stop_ids), len(ids))
    return list(ids[:end])


def margins(model: Any, rows: Sequence[Row], captions: Sequence[Sequence[int]]) -> float:
    """The smallest lead of a chosen token over the next best one: below rounding, greedy captions could differ."""
    least = float("inf")
    for row, ids in zip(rows, captions, strict=True):
        pixels, sizes = pad_images(row.pixels)
        fed = torch.cat([row.token_ids, torch.tensor(ids[:-1], dtype=torch.int64)])
        with torch.no_grad():
            logits = model(input_ids=fed[None], pixel_values=pixels, image_sizes=sizes).logits[0, -len(ids) :]
        best = logits.topk(2).values
        least = min(least, float((best[:, 0] - best[:, 1]).min()))
    return least
