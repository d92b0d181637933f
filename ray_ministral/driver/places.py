"""`Place`: room for the actor of one stage. `reserve_places` finds room for all stages of a replica at once.

Each place is a placement group of its own, so that one can be given up and another one asked for while the others keep
their actors. Ray (2.60) looks for room for a group that has lost a bundle with its node again and again without a
pause; where there is none, its control service keeps a core busy, and the agents that it tells of it keep another. A
new group waits quietly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_ministral.driver.autoscaler import Growth, growth
from ray_ministral.driver.cluster import Resolved
from ray_ministral.driver.policies import keep_waiting
from ray_ministral.errors import PlacementError

ANNOUNCE_EVERY_S = 5.0

NODES_TIMEOUT_S = 3600.0
"""How long to wait while nodes are on their way: a machine must be found, start, and install what it lacks."""

Announce = Callable[[str], None]


class Place:
    """Room for one stage, once the cluster has it; on the node `near`, where that has room."""

    def __init__(self, resolved: Resolved, near: str | None = None) -> None:
        self._resolved = resolved
        self._group = _group_of_one(resolved, near)

    @property
    def strategy(self) -> PlacementGroupSchedulingStrategy:
        """Puts an actor here; it waits until there is room."""
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0)

    @property
    def is_lost(self) -> bool:
        """Whether it was on a node that died."""
        return bool(placement_group_table(self._group).get("state") == "RESCHEDULING")

    def renew(self) -> None:
        """Ask for room anew, anywhere. What may be here is ended."""
        self.give_back()
        self._group = _group_of_one(self._resolved)

    def wait(self, timeout_s: float) -> bool:
        """Wait for room; whether it is there."""
        return bool(self._group.wait(timeout_seconds=timeout_s))

    def give_back(self) -> None:
        """End what is here, and let others have the room. Never raises."""
        with suppress(Exception):
            remove_placement_group(self._group)


def reserve_places(name: str, resolved: Resolved, stages: int, timeout_s: float, announce: Announce) -> list[Place]:
    """Places for all stages of a replica, close together. Raises `PlacementError` where there is no room.

    One group for all of them finds the room, so that of two replicas that want the last of it one gets all; it gives
    way to a group for each, on the same nodes.
    """
    deadline = time.monotonic() + timeout_s
    whole = placement_group([resolved.bundle] * stages, strategy="PACK")
    try:
        _wait_for_room(name, whole, resolved, stages, timeout_s, announce)
        nodes: dict[int, str] = placement_group_table(whole)["bundles_to_node_id"]
    finally:
        remove_placement_group(whole)
    places = [Place(resolved, nodes[stage]) for stage in range(stages)]
    try:
        for place in places:
            if not place.wait(max(ANNOUNCE_EVERY_S, deadline - time.monotonic())):
                raise _no_room(name, resolved, stages, timeout_s)
    except BaseException:
        for place in places:
            place.give_back()
        raise
    return places


def _group_of_one(resolved: Resolved, near: str | None = None) -> PlacementGroup:
    group: PlacementGroup = placement_group([resolved.bundle], strategy="STRICT_PACK", _soft_target_node_id=near)
    return group


def _wait_for_room(
    name: str, group: PlacementGroup, resolved: Resolved, stages: int, timeout_s: float, announce: Announce
) -> None:
    begun = coming_at = time.monotonic()
    while not group.wait(timeout_seconds=min(ANNOUNCE_EVERY_S, timeout_s)):
        now, growing = time.monotonic(), growth()
        coming_at = now if growing.is_coming else coming_at
        if not keep_waiting(now - begun, now - coming_at, timeout_s, NODES_TIMEOUT_S):
            raise _no_room(name, resolved, stages, now - begun, growing)
        announce(
            f"{name}: waiting for room for {_needs(resolved, stages)}; the cluster has {_offers(resolved)}{growing}"
        )


def _no_room(
    name: str, resolved: Resolved, stages: int, waited_s: float, growing: Growth | None = None
) -> PlacementError:
    return PlacementError(
        f"{name}: no room for {_needs(resolved, stages)} within {waited_s:.0f} s; the cluster has "
        f"{_offers(resolved)}{growing or ''}: use fewer --stages, --replicas or --threads-per-stage, or add nodes"
    )


def _needs(resolved: Resolved, stages: int) -> str:
    return f"{stages} x {', '.join(f'{amount:g} {kind}' for kind, amount in resolved.bundle.items())}"


def _offers(resolved: Resolved) -> str:
    free, has = ray.available_resources(), ray.cluster_resources()
    return ", ".join(f"{free.get(kind, 0):g} of {has.get(kind, 0):g} {kind} free" for kind in resolved.bundle)
