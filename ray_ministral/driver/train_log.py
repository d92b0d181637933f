"""What a training job leaves for people: files of lines, TensorBoard's events, a picture, lines on the terminal.

metrics.jsonl    a line a step
skipped.jsonl    a line for each row that could not be used
eval.jsonl       a line for each evaluation
captions.jsonl   a line for each caption of an evaluation
tensorboard/     the same figures as events
loss.png         loss and evaluations over the steps
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ray_ministral.driver.display import Display, duration
from ray_ministral.driver.loss_plot import Point, draw_losses
from ray_ministral.driver.train_events import EventWriter
from ray_ministral.training.samples import SkippedRow

if TYPE_CHECKING:
    from ray_ministral.driver.eval_captions import EvalCaption
    from ray_ministral.driver.evaluation import EvalResult
    from ray_ministral.driver.train_result import StepResult


class TrainLog:
    """A context manager around the run; `first_step` steps are done already, and what is said of later ones is undone.

    With `first_step` 0 nothing is done, and all that another run may have left is undone.
    """

    def __init__(self, output: Path, total_steps: int, first_step: int) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self._output = output
        self._metrics, self._skipped, self._evaluations, self._captions = (
            output / name for name in ("metrics.jsonl", "skipped.jsonl", "eval.jsonl", "captions.jsonl")
        )
        self._total, self._first = total_steps, first_step
        self._display = Display("steps", total_steps, first_step)
        self.skipped_rows = 0
        self._last: StepResult | None = None
        self._tokens, self._seconds = 0, 0.0
        self._keep(first_step, range(first_step + 1) if first_step else ())
        self._events = EventWriter(output / "tensorboard", first_step + 1 if first_step else 0)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._display.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.close()
        word = "done" if kind is None else "stopped"
        figures = "" if self._last is None else f": {self._display.count(self._last.step)}, {self._figures(self._last)}"
        self._display.close(f"{word} after {time.monotonic() - self._started:.1f} s{figures}")

    @property
    def last_loss(self) -> float | None:
        """Of this run's last step."""
        return None if self._last is None else self._last.loss

    @property
    def tokens_per_second(self) -> float:
        """Of this run's steps."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def rewind(self, done: int) -> None:
        """The run goes on after `done` steps: what is said of later ones is undone, for they are done again."""
        if self._keep(done, range(done + 1)):
            self._events.close()
            self._events = EventWriter(self._output / "tensorboard", done + 1)

    def _keep(self, done: int, known: Iterable[int]) -> bool:
        """Keep the lines of `done` steps, and those of `known` steps of everything else; whether steps were undone."""
        known = tuple(known)
        before = self._metrics.read_bytes() if self._metrics.exists() else b""
        _keep_steps(self._metrics, range(1, done + 1))
        _keep_steps(self._skipped, known)
        self.evaluated = _keep_steps(self._evaluations, known)
        # An evaluation counts once its loss is there, which is written after its captions.
        _keep_steps(self._captions, self.evaluated)
        return bool(before) and before != self._metrics.read_bytes()

    def message(self, text: str) -> None:
        """A line on stderr."""
        self._display.message(text)

    def step(self, result: StepResult, skipped: Sequence[SkippedRow]) -> None:
        """Write a step down, and the rows that it would have had."""
        self._last = result
        self._tokens += result.tokens
        self._seconds += result.seconds
        _append(self._metrics, [result.as_line()])
        self.skipped_rows += len(skipped)
        self._list_skipped(result.step, skipped)
        self._events.scalars(
            result.step,
            {
                "train/loss": result.loss,
                "train/grad_norm": result.grad_norm,
                "train/learning_rate": result.learning_rate,
                "train/tokens_per_second": result.tokens / result.seconds if result.seconds else 0.0,
                "train/bubble": result.bubble,
            },
        )
        self._display.show(result.step, lambda: self._figures(result))

    def evaluation(self, result: EvalResult, skipped: Sequence[SkippedRow], captions: Sequence[EvalCaption]) -> None:
        """Write an evaluation down. The rows that it leaves out are the same each time, and listed the first time."""
        if not self.evaluated:
            self._list_skipped(result.step, skipped)
        _append(self._captions, (json.dumps(asdict(caption), ensure_ascii=False) for caption in captions))
        _append(self._evaluations, [json.dumps(asdict(result))])
        self.evaluated.add(result.step)
        self._events.scalars(result.step, {"eval/loss": result.loss})
        skips = f", {result.skipped} rows skipped" if result.skipped else ""
        self.message(f"step {result.step}: evaluation loss {result.loss:.4f} over {result.rows} rows{skips}")
        for caption in captions:
            self.message(f"step {result.step}: {caption.caption!r}, expected {caption.expected!r}")

    def draw(self) -> None:
        """Draw `loss.png` anew."""
        draw_losses(self._output / "loss.png", _losses(self._metrics), _losses(self._evaluations))

    def _figures(self, result: StepResult) -> str:
        left = (self._total - result.step) * self._seconds / max(1, result.step - self._first)
        return (
            f"loss {result.loss:.4f}, norm {result.grad_norm:.3f}, rate {result.learning_rate:.2e}, "
            f"{self.tokens_per_second:.0f} tokens/s, bubble {result.bubble:.0%}, {duration(left)} left"
        )

    def _list_skipped(self, step: int, skipped: Iterable[SkippedRow]) -> None:
        _append(self._skipped, (json.dumps({"step": step, **asdict(row)}) for row in skipped))


def _append(path: Path, lines: Iterable[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    if text:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


def _keep_steps(path: Path, steps: Iterable[int]) -> set[int]:
    """Drop all lines but those of `steps` (others are done again); the steps that have lines."""
    if not path.exists():
        return set()
    allowed, kept, found = set(steps), [], set()
    for line in path.read_text(encoding="utf-8").splitlines():
        step = _value(line, "step")
        if step in allowed:
            kept.append(line)
            found.add(int(step))
    beside = path.with_name(f"_tmp.{path.name}")
    beside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    beside.replace(path)  # whole or not at all, whenever the job is killed
    return found


def _losses(path: Path) -> list[Point]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(int(_value(line, "step")), float(_value(line, "loss"))) for line in lines]


def _value(line: str, key: str) -> Any:
    """NaN for a line that was torn by a crash."""
    try:
        return json.loads(line)[key]
    except (ValueError, KeyError, TypeError):
        return float("nan")
