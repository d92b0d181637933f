"""The Ray tasks of a captioning job: preparing rows and writing parts, away from the driver.

They reserve no CPU: a small cluster gives all of its cores to the stages, and the work must still get done. How many
run at a time is the driver's decision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import ray

from ray_ministral.captioning.prepare import RowPreparer
from ray_ministral.captioning.request import Pixels, PreparedChunk, RowResult
from ray_ministral.config import ImageLimits, PromptConfig
from ray_ministral.data.parts import PartInfo, write_part
from ray_ministral.data.shards import Shard

OBJECTS_AHEAD = 4
"""A preparing task stops when so many of its objects (a chunk and its pixels are two) have not been taken."""


@lru_cache(maxsize=1)
def _preparer(model_dir: str, prompt: PromptConfig, images: ImageLimits, max_prompt_tokens: int) -> RowPreparer:
    """A worker process prepares many units of one job: tokenizer and image processor are loaded once."""
    return RowPreparer(model_dir, prompt=prompt, images=images, max_prompt_tokens=max_prompt_tokens)


@ray.remote(num_cpus=0, num_returns="streaming", scheduling_strategy="SPREAD", max_retries=0)
def prepare(
    shards: Sequence[Shard], model_dir: str, prompt: PromptConfig, images: ImageLimits, max_prompt_tokens: int
) -> Iterator[PreparedChunk | Pixels]:
    """See `captioning.prepare.prepare_shards`: a stream of chunks, each followed by its pixels."""
    yield from _preparer(model_dir, prompt, images, max_prompt_tokens).chunks(shards)


@ray.remote(num_cpus=0, max_retries=3, retry_exceptions=[OSError])
def write(
    shard: Shard, results: Sequence[RowResult], output: str, carried_columns: Sequence[str], with_token_ids: bool
) -> PartInfo:
    """See `data.parquet.write_part`. May run twice: a part is replaced by itself."""
    return write_part(
        shard, results, output=output, carried_columns=carried_columns, with_token_ids=with_token_ids
    )


def start_prepare(*arguments: Any) -> Any:
    """Start `prepare`; returns the generator of references."""
    return prepare.options(_generator_backpressure_num_objects=OBJECTS_AHEAD).remote(*arguments)
