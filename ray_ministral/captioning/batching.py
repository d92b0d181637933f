"""`BatchScheduler`: which rows go into which step of which microbatch of one replica. Pure: no Ray, no torch, no clock.

A replica has a few microbatches, one more than stages, so that every stage has work. Each step of a microbatch carries
one token of each of its decoding sequences and the prompts of rows just admitted; a row that ends gives its slot to the
next. Rows are spread evenly over the microbatches, within a bound on KV tokens, and every step is filled to about the
same number of tokens: so prompts (and vision with them) come all along beside decoding, not in a wave of their own, in
which the last stage waits for the first, and then the first for the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_ministral.captioning.plan import Prefill, StepPlan, in_blocks

WAITING_BYTES = 256 << 20
"""Pixels of requests that wait for a microbatch, of one replica."""

FinishCheck = Callable[[Sequence[int]], str | None]
"""Given the generated ids, the finish reason (`stop`) or None to go on."""


@dataclass(eq=False)
class Request:
    """A row to caption. `pixels` is (reference to a pixel block, row in it), opaque here; None for a text-only row.

    key: what the row's result is filed under. token_ids: int32 [P]. sample_key: uint64 as in `StepPlan`.
    generated: what it has said so far; a row that has lost its place goes on from there.
    group: where it is not None, the row shares a microbatch with rows of its group alone. exclusive: and while it runs,
    nothing else does. deaths, deaths_by_itself: of stages that its steps were on; see `suspects.Suspects`.
    """

    key: Any
    token_ids: np.ndarray
    max_new_tokens: int
    sample_key: int
    pixels: tuple[Any, int] | None = None
    pixel_bytes: int = 0
    attempts: int = 1
    group: int | None = None
    exclusive: bool = False
    deaths: int = 0
    deaths_by_itself: int = 0
    generated: list[int] = field(default_factory=list)

    @property
    def kv_tokens(self) -> int:
        """Tokens that its slot must hold at most: the last generated token is never fed back."""
        return len(self.token_ids) + self.max_new_tokens - 1

    @property
    def is_new(self) -> bool:
        """Whether no step has given it a token yet."""
        return not self.generated

    @property
    def block(self) -> Any:
        """The reference to the block that its pixels are in; None for a row without any."""
        return None if self.pixels is None else self.pixels[0]

    @property
    def known_tokens(self) -> int:
        """Of the prompt and of what is generated: all that is fed when the row gets a slot."""
        return len(self.token_ids) + len(self.generated)

    @property
    def known_ids(self) -> np.ndarray:
        """int32 `[known_tokens]`."""
        return np.concatenate([self.token_ids, np.asarray(self.generated, dtype=np.int32)])


@dataclass(frozen=True)
class Finished:
    """A request that has all its tokens, and why it ended: `stop` or `length`."""

    request: Request
    finish_reason: str


@dataclass(eq=False)
class Microbatch:
    """`running` are the decoding sequences, by slot; `entering` the ones whose prompt is in the step under way."""

    index: int
    running: list[Request] = field(default_factory=list)
    entering: list[Request] = field(default_factory=list)
    in_flight: StepPlan | None = None
    moves: list[tuple[int, int]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Sequences that hold a slot."""
        return len(self.running) + len(self.entering)

    @property
    def requests(self) -> list[Request]:
        """By slot."""
        return self.running + self.entering

    @property
    def is_taken(self) -> bool:
        """By a group that has it to itself."""
        return any(request.group is not None for request in self.requests)

    @property
    def is_exclusive(self) -> bool:
        """Whether no other microbatch may run."""
        return any(request.exclusive for request in self.requests)


@dataclass(frozen=True)
class Launch:
    """A step to run: its plan, and the pixel blocks that the plan counts, in order."""

    plan: StepPlan
    blocks: tuple[Any, ...]


class BatchScheduler:
    """Admits requests to microbatches and turns sampled tokens into finished requests."""

    def __init__(
        self,
        *,
        microbatches: int,
        rows_per_microbatch: int,
        kv_tokens_per_microbatch: int,
        tokens_per_step: int,
        finish_check: FinishCheck,
    ) -> None:
        """A step takes prompts in while it has fewer than `tokens_per_step` tokens with them; one is always let in."""
        self.waiting: deque[Request] = deque()
        self.microbatches = [Microbatch(index) for index in range(microbatches)]
        self._rows_limit = rows_per_microbatch
        self._kv_limit = kv_tokens_per_microbatch
        self._step_limit = tokens_per_step
        self._finish_check = finish_check
        self._steps = 0
        self._generation = 0

    @property
    def active(self) -> int:
        """Sequences that hold a slot."""
        return sum(microbatch.rows for microbatch in self.microbatches)

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.waiting and not self.active

    @property
    def room(self) -> int:
        """How many more requests are worth having at hand: enough to fill every microbatch once over.

        None while the images of those that wait have `WAITING_BYTES`: their pixels are held in memory.
        """
        if sum(request.pixel_bytes for request in self.waiting) >= WAITING_BYTES:
            return 0
        return max(0, 2 * self._rows_limit * len(self.microbatches) - self.active - len(self.waiting))

    def fits(self, request: Request) -> bool:
        """Whether the request can run at all, on its own."""
        return request.kv_tokens <= self._kv_limit

    def add(self, request: Request) -> None:
        """Queue a request that `fits`."""
        assert self.fits(request), "the caller turns requests that don't fit into row errors"
        self.waiting.append(request)

    def add_first(self, requests: Sequence[Request]) -> None:
        """Put requests that have had a place, and lost it, before all that wait, in this order."""
        self.waiting.extendleft(reversed(requests))

    def launches(self) -> list[Launch]:
        """A step for each microbatch that is not in flight and has something to do."""
        ready = (self._launch(microbatch) for microbatch in self._may_run() if microbatch.in_flight is None)
        return [launch for launch in ready if launch is not None]

    def _may_run(self) -> list[Microbatch]:
        """All microbatches, but for a row that nothing may run beside."""
        taken = [microbatch for microbatch in self.microbatches if microbatch.is_exclusive]
        if taken or not self.waiting or not self.waiting[0].exclusive:
            return taken or self.microbatches
        if any(microbatch.in_flight for microbatch in self.microbatches):
            return []
        empty = [microbatch for microbatch in self.microbatches if not microbatch.rows]
        return empty[:1] or self.microbatches

    def complete(self, plan: StepPlan, tokens: np.ndarray) -> list[Finished]:
        """Take the sampled tokens of a step; returns the requests that are done with it."""
        microbatch = self._landed(plan)
        sequences = microbatch.requests
        microbatch.entering = []
        finished: list[Finished] = []
        keep: list[Request | None] = []
        for request, token in zip(sequences, tokens.tolist(), strict=True):
            request.generated.append(token)
            reason = self._finish_check(request.generated)
            if reason is None and len(request.generated) >= request.max_new_tokens:
                reason = "length"
            if reason is not None:
                finished.append(Finished(request, reason))
            keep.append(request if reason is None else None)
        microbatch.running, microbatch.moves = _compact(keep)
        return finished

    def fail(self, plan: StepPlan) -> list[Request]:
        """A step has failed: its sequences lose their slots and are given back, to be tried again or given up."""
        return self._emptied(self._landed(plan))

    def reset(self, generation: int) -> tuple[list[Request], list[Request]]:
        """The stages have lost their caches: no step is in flight, nobody holds a slot, nobody waits.

        Gives all requests back: those of steps that were in flight, and the others, longest here first. Plans are of
        `generation` from now on.
        """
        self._generation = generation
        in_flight: list[Request] = []
        others: list[Request] = []
        for microbatch in self.microbatches:
            (others if microbatch.in_flight is None else in_flight).extend(self._emptied(microbatch))
        others += self.waiting
        self.waiting.clear()
        return in_flight, others

    def _emptied(self, microbatch: Microbatch) -> list[Request]:
        lost = microbatch.requests
        microbatch.running, microbatch.entering, microbatch.moves, microbatch.in_flight = [], [], [], None
        return lost

    def _landed(self, plan: StepPlan) -> Microbatch:
        microbatch = self.microbatches[plan.microbatch]
        assert microbatch.in_flight is plan, (
            f"step {plan.step} is not the one in flight in microbatch {plan.microbatch}"
        )
        microbatch.in_flight = None
        return microbatch

    def _launch(self, microbatch: Microbatch) -> Launch | None:
        decoding = list(microbatch.running)
        microbatch.entering = self._admit(microbatch)
        sequences = decoding + microbatch.entering
        if not sequences:
            return None
        blocks: list[Any] = []
        prefills = []
        for offset, request in enumerate(microbatch.entering):
            images: tuple[tuple[int, int], ...] = ()
            if request.pixels is not None:
                block, row = request.pixels
                if block not in blocks:
                    blocks.append(block)
                images = ((blocks.index(block), row),)
            prefills.append(Prefill(len(decoding) + offset, 0, request.known_tokens, True, images))
        fed = np.asarray([request.generated[-1] for request in decoding], dtype=np.int32)
        plan = StepPlan(
            step=self._steps,
            microbatch=microbatch.index,
            moves=tuple(microbatch.moves),
            token_ids=np.concatenate([fed, *(request.known_ids for request in microbatch.entering)]).astype(np.int32),
            decode_positions=np.asarray([request.known_tokens - 1 for request in decoding], dtype=np.int32),
            prefills=tuple(prefills),
            sample_keys=np.asarray([request.sample_key for request in sequences], dtype=np.uint64),
            sample_positions=np.asarray([request.known_tokens for request in sequences], dtype=np.int64),
            generation=self._generation,
        )
        self._steps += 1
        microbatch.moves = []
        microbatch.in_flight = plan
        return Launch(plan, tuple(blocks))

    def _admit(self, microbatch: Microbatch) -> list[Request]:
        """Requests from the head of the queue, as many as this microbatch's even share and limits allow."""
        rows = self.active + len(self.waiting)
        used = microbatches_for(rows, len(self.microbatches), self._rows_limit)
        taken = sum(other.is_taken for other in self.microbatches if other is not microbatch)
        if microbatch.index >= used + taken and not (self.waiting and self.waiting[0].exclusive):
            return []
        places = min(self._rows_limit, -(-rows // used)) - len(microbatch.running)
        admitted: list[Request] = []
        held = sum(in_blocks(request.kv_tokens) for request in microbatch.running)
        tokens = len(microbatch.running)
        while self.waiting and len(admitted) < places:
            request = self.waiting[0]
            held += in_blocks(request.kv_tokens)
            tokens += request.known_tokens
            # The first one always goes in: it fits on its own, and waiting would not make it smaller.
            present = next(iter(admitted or microbatch.running), None)
            stranger = present is not None and present.group != request.group
            if (present and held > self._kv_limit) or (admitted and tokens > self._step_limit) or stranger:
                break
            admitted.append(self.waiting.popleft())
        return admitted


def microbatches_for(rows: int, microbatches: int, rows_per_microbatch: int) -> int:
    """How many of a replica's microbatches to spread so many rows over: few full steps cost less than many small ones.

    All but one are as many as there are stages, and keep them busy.
    """
    return min(microbatches, max(1, microbatches - 1, -(-rows // rows_per_microbatch)))


def _compact(slots: list[Request | None]) -> tuple[list[Request], list[tuple[int, int]]]:
    """Close the holes: sequences from the end move into the slots of ended ones; gives them by slot, and the moves."""
    moves: list[tuple[int, int]] = []
    low, high = 0, len(slots) - 1
    while True:
        while low < len(slots) and slots[low] is not None:
            low += 1
        while high >= 0 and slots[high] is None:
            high -= 1
        if low >= high:
            break
        slots[low], slots[high] = slots[high], None
        moves.append((high, low))
    return [request for request in slots if request is not None], moves
