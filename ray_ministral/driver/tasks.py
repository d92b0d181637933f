"""The Ray tasks of a captioning job: preparing rows and writing attempts at parts, away from the driver.

They reserve no CPU: a small cluster gives all of its cores to the stages, and the work must still get done. How many
run at a time is the driver's decision.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import ray

from ray_ministral.captioning.prepare import RowPreparer
from ray_ministral.captioning.request import Began, Pixels, PreparedChunk, RowResult
from ray_ministral.config import ImageLimits, PromptConfig
from ray_ministral.data.limits import lift_limits
from ray_ministral.data.parts import Attempt, read_own_columns, write_part
from ray_ministral.data.shards import Shard
from ray_ministral.errors import InputError

OBJECTS_AHEAD = 4
"""A preparing task stops when so many of its objects (a chunk and its pixels are two) have not been taken."""


@lru_cache(maxsize=1)
def _preparer(
    model_dir: str, prompt: PromptConfig, images: ImageLimits, max_prompt_tokens: int, limit_column: str | None
) -> RowPreparer:
    """A worker process prepares many units of one job: tokenizer and image processor are loaded once."""
    return RowPreparer(
        model_dir, prompt=prompt, images=images, max_prompt_tokens=max_prompt_tokens, limit_column=limit_column
    )


@ray.remote(num_cpus=0, num_returns="streaming", scheduling_strategy="SPREAD", max_retries=0)
def prepare(
    shards: Sequence[Shard],
    model_dir: str,
    prompt: PromptConfig,
    images: ImageLimits,
    max_prompt_tokens: int,
    limit_column: str | None,
) -> Iterator[Began | PreparedChunk | Pixels]:
    """See `captioning.prepare.prepare_shards`: a stream of chunks, each followed by its pixels. `Began` comes first.

    A row that takes longer than `images.deadline_s` ends the worker. Limits on memory hold while a batch is read and
    while a row is prepared, and are gone before anything is yielded: a worker writes parts and runs other tasks, too.
    """
    lift_limits()
    made = _preparer(model_dir, prompt, images, max_prompt_tokens, limit_column).chunks(shards)
    yield Began(time.time())
    while True:
        started, begun = time.time(), time.perf_counter()
        item = next(made, None)
        if item is None:
            return
        if isinstance(item, PreparedChunk):
            item = replace(item, started=started, seconds=time.perf_counter() - begun)
        yield item


@ray.remote(num_cpus=0, max_retries=3, retry_exceptions=[OSError, InputError])  # type: ignore[call-overload, untyped-decorator]  # Ray's types lag
def write(
    shard: Shard,
    results: Sequence[RowResult],
    output: str,
    carried_columns: Sequence[str],
    with_token_ids: bool,
    keep_others: bool,
) -> Attempt:
    """See `data.parts.write_part`. May run twice, even at once: each run writes an attempt of its own, under a name of
    its own, and the driver commits the one that is returned to it. One that was given up can do no harm.

    With `keep_others` the part is there already, and rows without a new result keep the one that they have.
    """
    lift_limits()  # of a preparing task that was cancelled in this worker
    if keep_others:
        results = _merged(output, shard.part_name, results)
    return write_part(shard, results, output=output, carried_columns=carried_columns, with_token_ids=with_token_ids)


def _merged(output: str, name: str, results: Sequence[RowResult]) -> list[RowResult]:
    merged = {row["row"]: RowResult(**row) for row in read_own_columns(output, name)}
    for result in results:
        merged[result.row] = replace(result, attempts=merged[result.row].attempts + result.attempts)
    return list(merged.values())


def start_prepare(*arguments: Any) -> Any:
    """Start `prepare`; returns the generator of references."""
    return prepare.options(_generator_backpressure_num_objects=OBJECTS_AHEAD).remote(*arguments)
