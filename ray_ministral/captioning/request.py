"""What a row is on its way from the parquet file to its caption: prepared, or failed, then a result.

All of it is small and picklable: pixels travel beside a `PreparedChunk`, never in it. Nothing here knows torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ray_ministral.data.rows import Pixels, RowFailure

__all__ = ["OK", "Pixels", "PreparedChunk", "PreparedRow", "RowFailure", "RowResult"]

OK = "ok"


@dataclass(frozen=True, eq=False)
class PreparedRow:
    """One row, ready for the pipeline, or why it is not.

    `row` counts within the row group (not within the shard). `token_ids` is int32 `[P]` with the image placeholders
    expanded, None when the row failed. `image_sizes` has (height, width) in pixels after resizing, each a multiple of
    patch size times spatial merge size; empty for a text-only or a failed row. `max_new_tokens` is the row's own limit,
    None where it has none.
    """

    row: int
    token_ids: np.ndarray | None
    image_sizes: tuple[tuple[int, int], ...]
    failure: RowFailure | None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.token_ids is None) == (self.failure is None):
            raise ValueError(f"row {self.row} must have either token ids or a failure, and not both")


@dataclass(frozen=True, eq=False)
class PreparedChunk:
    """Some consecutive rows of one shard; `pixel_bytes` is the size of the pixels that go with it.

    started, seconds: since the epoch, when their reading began, and how long it took until they were prepared; 0 where
    nobody measured it.
    """

    shard_index: int
    rows: tuple[PreparedRow, ...]
    pixel_bytes: int
    started: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Began:
    """What a preparing task says first: its worker is up, and begins with the rows, at `at` (seconds since the epoch).

    From the task's start to there it may have waited for a worker, and for that one's imports.
    """

    at: float


@dataclass(frozen=True)
class RowResult:
    """What is written for one row. `row` counts within the row group; `token_ids` are the generated ids."""

    row: int
    caption: str | None
    status: str
    error: str | None
    error_stage: str | None
    finish_reason: str | None
    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    attempts: int
    token_ids: tuple[int, ...] | None

    @classmethod
    def failed(
        cls, row: int, failure: RowFailure, *, prompt_tokens: int = 0, image_tokens: int = 0, attempts: int = 1
    ) -> RowResult:
        """The result of a row that has no caption."""
        return cls(
            row=row,
            caption=None,
            status=failure.status,
            error=failure.error,
            error_stage=failure.stage,
            finish_reason=None,
            prompt_tokens=prompt_tokens,
            image_tokens=image_tokens,
            completion_tokens=0,
            attempts=attempts,
            token_ids=None,
        )
