"""What captioning and training both say of a row: its pixels, and why it could not be used. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ray_ministral.errors import RowError

Pixels = list[list[np.ndarray]]
"""The pixels of some rows: for each of them a list of images, uint8 `[3, H, W]`, already resized."""


@dataclass(frozen=True)
class RowFailure:
    """A `RowError` as data: `status` as the output has it, `stage` that failed, `error` for people."""

    status: str
    error: str
    stage: str

    @classmethod
    def of(cls, error: RowError) -> RowFailure:
        """The failure that `error` stands for."""
        return cls(status=error.status, error=str(error), stage=error.stage)
