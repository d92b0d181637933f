"""`Newcomer`: one stage more, on its way beside training: it finds a place, imports, and reads what it is to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from ray_ministral.driver.cluster import Resolved
from ray_ministral.driver.pipeline import NewActor, is_ready
from ray_ministral.driver.places import Place
from ray_ministral.driver.train_members import Member
from ray_ministral.training.plan import TrainStageOptions


class Newcomer:
    """Asks for room at once, and waits for nothing: it is polled."""

    def __init__(self, resolved: Resolved, new_actor: NewActor) -> None:
        self._new_actor = new_actor
        self._place = Place(resolved)
        self._waiting_for: Any = None
        self.member: Member | None = None
        """Once it has an actor."""

    @property
    def is_ready(self) -> bool:
        """Whether it has read what it is to be."""
        return self.member is not None and self.member.loaded is not None and is_ready(self._waiting_for)

    def poll(self, options: Callable[[Member], TrainStageOptions]) -> bool:
        """Take it a step further; whether it is ready. `options` says what it is to be. Raises RayError if it died."""
        if self.member is None:
            if self._place.wait(0):
                actor, warm_up = self._new_actor(self._place)
                self.member, self._waiting_for = Member(actor, warm_up, self._place), warm_up
            return False
        if not is_ready(self._waiting_for):
            return False
        result = ray.get(self._waiting_for)
        if self.member.loaded is None:
            self.member.loaded = options(self.member)
            self._waiting_for = self.member.actor.load.remote(self.member.loaded)
            return False
        self.member.report = result
        return True

    def end(self) -> None:
        """It is not needed any more. Never raises."""
        if self.member is None:
            self._place.give_back()
        else:
            self.member.end()
