"""What a training job says of a step and of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TrainSummary:
    """What a training job did.

    recoveries: how often it went on after a loss, in `recovery_seconds` until the next step was done. steps_lost: begun
    and done again.
    """

    steps: int
    first_step: int
    loss: float | None
    seconds: float
    tokens_per_second: float
    skipped_rows: int
    output: str
    recoveries: int = 0
    recovery_seconds: float = 0.0
    steps_lost: int = 0


@dataclass(frozen=True)
class StepResult:
    """One line of `metrics.jsonl`. `step` counts from 1; `loss` is the mean over the step's targets."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    stages: int
    generation: int
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """The share of the step's time, over all stages, in which a stage did not compute."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds) if self.seconds else 0.0

    def as_line(self) -> str:
        """Numbers with all their digits."""
        values = asdict(self)
        del values["busy"]
        return json.dumps(values)
