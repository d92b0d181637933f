"""What a training job leaves for people: `metrics.jsonl`, `skipped.jsonl`, and lines on the terminal."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ray_ministral.training.samples import PreparedSamples

if TYPE_CHECKING:
    from ray_ministral.driver.trainer import StepResult

LINE_EVERY_S = 5.0


class TrainLog:
    """A context manager around the run; `first_step` steps are done already, and lines after them are taken back."""

    def __init__(self, output: Path, total_steps: int, first_step: int) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self._metrics = output / "metrics.jsonl"
        self._skipped = output / "skipped.jsonl"
        self._total, self._first = total_steps, first_step
        self.skipped_rows = 0
        self.last_loss: float | None = None
        self._tokens, self._seconds = 0, 0.0
        self._next_line = 0.0
        for path in (self._metrics, self._skipped):
            _keep_steps(path, first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.message("done" if kind is None else "stopped")

    @property
    def tokens_per_second(self) -> float:
        """Of this run's steps."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def message(self, text: str) -> None:
        """A line on stderr."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def step(self, result: StepResult, prepared: PreparedSamples) -> None:
        """Write a step down."""
        from ray_ministral.driver.trainer import as_line

        self.last_loss = result.loss
        self._tokens += result.tokens
        self._seconds += result.seconds
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(as_line(result) + "\n")
        if prepared.skipped:
            self.skipped_rows += len(prepared.skipped)
            with self._skipped.open("a", encoding="utf-8") as file:
                for row in prepared.skipped:
                    file.write(json.dumps({"step": result.step, **asdict(row)}) + "\n")
        now = time.monotonic()
        if now >= self._next_line or result.step == self._total:
            self._next_line = now + LINE_EVERY_S
            left = (self._total - result.step) * self._seconds / max(1, result.step - self._first)
            busy = sum(result.busy) / (len(result.busy) * result.seconds) if result.seconds else 0.0
            self.message(
                f"step {result.step}/{self._total}: loss {result.loss:.4f}, norm {result.grad_norm:.3f}, "
                f"rate {result.learning_rate:.2e}, {self.tokens_per_second:.0f} tokens/s, bubble {1 - busy:.0%}, "
                f"{left:.0f} s left"
            )


def _keep_steps(path: Path, steps: int) -> None:
    """Drop the lines of steps after `steps`: they are done again."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= steps]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # torn by a crash
