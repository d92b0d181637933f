"""`Copies`: what outlives a stage: its trained state after each of the last two steps, in the object store of its node,
and where there is another node, in the memory of that, too. The driver has references alone."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ministral.driver.cluster import alive_nodes
from ray_ministral.driver.pipeline import end_actor, has_succeeded, is_ready, lost_objects
from ray_ministral.training.migration import Piece

STEPS_KEPT = 2
"""Some stages may have done the last step when others die before they have: then all go back to the one before."""

LOOK_EVERY_S = 2.0
"""How often to see which nodes there are."""


@dataclass(frozen=True, eq=False)
class Copy:
    """Some pieces as they were after a step. `made`: a small result of the same call, which fails if it has failed."""

    pieces: frozenset[Piece]
    parcel: Any
    made: Any

    def is_there(self) -> bool:
        """Whether the call that made it has succeeded. Its bytes may be lost."""
        return has_succeeded(self.made)


class Holder:
    """Keeps copies in the memory of its node: the arrays lie in the node's object store, which keeps what is in use."""

    def __init__(self) -> None:
        self._held: dict[int, list[Any]] = {}

    def hold(self, done: int, parcel: Any) -> None:
        """Keep a copy of the state after `done` steps; forget those of long ago, and those of steps that are void."""
        self._held = {step: held for step, held in self._held.items() if done - STEPS_KEPT < step <= done}
        self._held.setdefault(done, []).append(parcel)


class Copies:
    """By the number of steps done."""

    def __init__(self) -> None:
        self._copies: dict[int, list[Copy]] = {}
        self._holders: dict[str, Any] = {}
        self._holding: list[Any] = []
        self._nodes: list[str] = []
        self._look_at = 0.0

    def begin(self, done: int) -> None:
        """Copies of the state after `done` steps will come; those that nobody can need any more are dropped.

        So are those of later steps, which are void, and another attempt at this one.
        """
        self._copies = {step: kept for step, kept in self._copies.items() if done - STEPS_KEPT < step < done}
        self._copies[done] = []
        if time.monotonic() > self._look_at:
            self._nodes, self._look_at = sorted(alive_nodes()), time.monotonic() + LOOK_EVERY_S
        self._holding = [reference for reference in self._holding if not is_ready(reference)]

    def add(self, done: int, copy: Copy, node: str | None = None) -> None:
        """A copy that comes into being on `node`; the next node gets one, too. None: it stays where it is."""
        self._copies.setdefault(done, []).append(copy)
        others = [other for other in self._nodes if other != node]
        if node is None or not others:
            return
        buddy = next((other for other in others if other > node), others[0])
        self._holding.append(self._holder(buddy).hold.remote(done, copy.parcel))

    def kept(self) -> dict[int, set[Piece]]:
        """The pieces that can be had, by steps done."""
        return {done: {piece for copy in self._there(done) for piece in copy.pieces} for done in self._copies}

    def parcels(self, done: int, pieces: Collection[Piece]) -> list[Any]:
        """References that together have these pieces, as far as they can be had."""
        left, chosen = set(pieces), []
        for copy in self._there(done):
            if left & copy.pieces:
                chosen.append(copy.parcel)
                left -= copy.pieces
        return chosen

    def clear(self) -> None:
        """Forget all of them: the run begins again at another step."""
        self._copies.clear()

    def close(self) -> None:
        """End the actors that hold copies. Never raises."""
        for holder in self._holders.values():
            end_actor(holder)

    def _there(self, done: int) -> Iterable[Copy]:
        made = [copy for copy in self._copies.get(done, []) if copy.is_there()]
        lost: set[Any] = set()
        with suppress(RayError):
            lost = lost_objects([copy.parcel for copy in made]) if made else set()
        return [copy for copy in made if copy.parcel not in lost]

    def _holder(self, node: str) -> Any:
        """The actor on a node; a new one where the last one's node has died and come back."""
        if node not in self._holders:
            remote: Any = ray.remote
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            self._holders[node] = (
                remote(num_cpus=0, max_restarts=-1)(Holder).options(scheduling_strategy=strategy).remote()
            )
        return self._holders[node]
