"""Where a stage's time goes: sums over all steps, and each step where a timeline is wanted. No torch, no Ray."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields

SPANS_KEPT = 10_000
"""Steps that a traced stage holds until they are taken; where nobody takes them, the oldest give way."""


@dataclass(frozen=True)
class StepSpan:
    """One step of one microbatch on one stage.

    started: seconds since the epoch, by this stage's clock. seconds: the whole step. before_seconds: of these, from the
    start until the model: plan, KV cache, pixels, hidden states from the wire. model_seconds: then in the model,
    sampling included; what is left is the way out. prefill_tokens, decode_tokens: of the stream. images: whose pixels
    the stage encodes (0 on all stages but the first).
    """

    step: int
    microbatch: int
    started: float
    seconds: float
    before_seconds: float
    model_seconds: float
    prefill_tokens: int
    decode_tokens: int
    images: int


@dataclass(frozen=True)
class StageTotals:
    """Sums over the steps of a stage; names as in `StepSpan`, `busy_seconds` are the whole steps."""

    steps: int = 0
    busy_seconds: float = 0.0
    model_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    images: int = 0

    @property
    def tokens(self) -> int:
        """Of the streams of all steps."""
        return self.prefill_tokens + self.decode_tokens

    @property
    def outside_seconds(self) -> float:
        """Busy, but not in the model: wire, KV cache, plan."""
        return self.busy_seconds - self.model_seconds

    def and_also(self, other: StageTotals) -> StageTotals:
        """Of two stages, or of two processes that were the same stage."""
        return StageTotals(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def plus(self, span: StepSpan) -> StageTotals:
        """With one more step."""
        return StageTotals(
            steps=self.steps + 1,
            busy_seconds=self.busy_seconds + span.seconds,
            model_seconds=self.model_seconds + span.model_seconds,
            prefill_tokens=self.prefill_tokens + span.prefill_tokens,
            decode_tokens=self.decode_tokens + span.decode_tokens,
            images=self.images + span.images,
        )


class StepTimes:
    """Takes note of steps in one thread, is asked in another; `traced` also keeps the steps themselves, until taken."""

    def __init__(self, *, traced: bool, kept: int = SPANS_KEPT) -> None:
        self.totals = StageTotals()
        self._spans: deque[StepSpan] = deque(maxlen=kept if traced else 0)

    def add(self, span: StepSpan) -> None:
        """A step is over."""
        self.totals = self.totals.plus(span)
        self._spans.append(span)

    def take(self) -> list[StepSpan]:
        """The steps since the last call, oldest first."""
        return [self._spans.popleft() for _ in range(len(self._spans))]
