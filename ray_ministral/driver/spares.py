"""`Spares`: actors that have imported everything and wait to stand in for a stage that dies.

Each has a place of its own. The place of the stage that it stands in for becomes the place of the next spare.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group

from ray_ministral.driver.pipeline import NewActor, Pipeline, Place, end_actor, is_ready


@dataclass(frozen=True, eq=False)
class _Spare:
    actor: Any
    warm_up: Any
    place: Place


class Spares:
    """Starts `number` of them at once, and waits for none: where there is no room, there is none until there is."""

    def __init__(self, number: int, new_actor: NewActor) -> None:
        self._new_actor = new_actor
        self._groups = [placement_group([new_actor.resolved.bundle]) for _ in range(number)]
        self._waiting: list[_Spare] = []
        for group in self._groups:
            self._start(Place(group))

    def stand_in(self, pipeline: Pipeline, index: int) -> bool:
        """Give a stage of `pipeline` a spare in place of its actor; False where none is ready."""
        for spare in self._waiting:
            if _is_warm(spare):
                break
        else:
            return False
        self._waiting.remove(spare)
        end_actor(pipeline.actors[index])
        freed, pipeline.places[index] = pipeline.places[index], spare.place
        pipeline.actors[index], pipeline.warm_ups[index] = spare.actor, spare.warm_up
        self._start(freed)
        return True

    def close(self) -> None:
        """End them and give their room back. Never raises."""
        for spare in self._waiting:
            end_actor(spare.actor)
        for group in self._groups:
            with suppress(Exception):
                remove_placement_group(group)

    def _start(self, place: Place) -> None:
        actor, warm_up = self._new_actor(place)
        self._waiting.append(_Spare(actor, warm_up, place))


def _is_warm(spare: _Spare) -> bool:
    if not is_ready(spare.warm_up):
        return False
    try:
        ray.get(spare.warm_up)
    except RayError:
        return False
    return True
