"""`Mailbox`: the messages of one step between this stage and its neighbours.

A message travels when both sides have asked for it, so receives are asked for ahead of need: a hidden state or a
gradient arrives while the stage still computes something else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from ray_ministral.pipeline.schedule import RECEIVES, Action, Kind
from ray_ministral.pipeline.transport import Transport
from ray_ministral.training.plan import TrainPlan

RECEIVES_AHEAD = 2
"""Messages that are asked for before they are needed; each takes the memory of one hidden state."""

TIED_TAG = 1 << 30
"""Tag of the messages about a tied embedding; those of activations count from 0."""


class Mailbox:
    """Sends and receives what a plan's actions say; shapes are known from the plan."""

    def __init__(
        self,
        transport: Transport,
        plan: TrainPlan,
        *,
        num_stages: int,
        num_chunks: int,
        hidden: int,
        dtype: torch.dtype,
    ) -> None:
        self._transport, self._plan = transport, plan
        self._num_stages, self._num_chunks = num_stages, num_chunks
        self._hidden, self._dtype = hidden, dtype
        self._coming = deque(action for action in plan.actions if action.kind in RECEIVES)
        self._asked: dict[Action, Callable[[], Tensor]] = {}
        self._ask()

    def send(self, action: Action, tensor: Tensor) -> None:
        """Start the `SEND` of `[T, 1, H]`; the tensor must not change until `flush`."""
        self._transport.send(tensor, self._peer(action), self._tag(action))

    def receive(self, action: Action) -> Tensor:
        """Wait for the message of a `RECV`: `[T, 1, H]`."""
        wait = self._asked.pop(action)
        self._ask()
        return wait()

    def flush(self) -> None:
        """Wait until everything that was sent has left."""
        self._transport.flush()

    def _ask(self) -> None:
        while self._coming and len(self._asked) < RECEIVES_AHEAD:
            action = self._coming.popleft()
            shape = (self._plan.microbatches[action.microbatch].num_tokens, 1, self._hidden)
            self._asked[action] = self._transport.receive(shape, self._dtype, self._peer(action), self._tag(action))

    def _peer(self, action: Action) -> int:
        """The stage at the other end."""
        forward = action.kind in {Kind.SEND_F, Kind.RECV_B}
        return (action.chunk + (1 if forward else -1)) % self._num_stages

    def _tag(self, action: Action) -> int:
        """Both ends call a message by its direction and the chunk that sends it."""
        backward = action.kind in {Kind.SEND_B, Kind.RECV_B}
        sender = action.chunk + {Kind.RECV_F: -1, Kind.RECV_B: 1}.get(action.kind, 0)
        return (action.microbatch * self._num_chunks + sender) * 2 + backward
