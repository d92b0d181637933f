"""`Spares`: actors that have imported everything and wait to stand in for a stage that dies.

Each has a place of its own. The place of the stage that it stands in for becomes the place of the next spare.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ray_ministral.driver.pipeline import NewActor, Pipeline, end_actor, has_succeeded
from ray_ministral.driver.places import Place

LOOK_EVERY_S = 2.0
"""How often to see whether places were lost."""


@dataclass(frozen=True, eq=False)
class _Spare:
    actor: Any
    warm_up: Any
    place: Place


class Spares:
    """Starts `number` of them at once, and waits for none: where there is no room, there is none until there is."""

    def __init__(self, number: int, new_actor: NewActor) -> None:
        self._new_actor = new_actor
        self._waiting: list[_Spare] = []
        self._look_at = 0.0
        for _ in range(number):
            self._start(Place(new_actor.resolved))

    def stand_in(self, pipeline: Pipeline, index: int) -> bool:
        """Give a stage of `pipeline` a spare in place of its actor; False where none is ready."""
        for spare in self._waiting:
            if has_succeeded(spare.warm_up):
                break
        else:
            return False
        self._waiting.remove(spare)
        end_actor(pipeline.actors[index])
        freed, pipeline.places[index] = pipeline.places[index], spare.place
        pipeline.actors[index], pipeline.warm_ups[index] = spare.actor, spare.warm_up
        self._start(freed)
        return True

    @property
    def ready(self) -> int:
        """How many could stand in now."""
        return sum(has_succeeded(spare.warm_up) for spare in self._waiting)

    def poll(self) -> None:
        """Start those anew whose node has died."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_EVERY_S
        for spare in [spare for spare in self._waiting if spare.place.is_lost]:
            self._waiting.remove(spare)
            end_actor(spare.actor)
            self._start(spare.place)

    def close(self) -> None:
        """End them and give their room back. Never raises."""
        for spare in self._waiting:
            end_actor(spare.actor)
            spare.place.give_back()

    def _start(self, place: Place) -> None:
        if place.is_lost:
            place.renew()
        actor, warm_up = self._new_actor(place)
        self._waiting.append(_Spare(actor, warm_up, place))
