"""Who is left of a replica in training after a loss, whether there is room for others, who takes the lost places."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import ray
from ray.exceptions import RayError

from ray_ministral.config import PipelineConfig
from ray_ministral.driver.pipeline import Pipeline
from ray_ministral.driver.places import ANNOUNCE_EVERY_S
from ray_ministral.driver.spares import Spares
from ray_ministral.driver.train_actor import Held
from ray_ministral.driver.train_members import NOTHING, Member, members_of, set_members

LAST_CALL_S = 15.0
"""What stages have to come back, once calls are overdue."""

PING_S = 3.0

Announce = Callable[[str], None]


def find_survivors(pipeline: Pipeline, config: PipelineConfig, announce: Announce, *, overdue: bool) -> dict[int, Held]:
    """What the stages say that live and come back from what they are doing; the others are ended.

    overdue: they have had their time already.
    """
    calls = {actor.void.remote(): stage for stage, actor in enumerate(pipeline.actors)}
    found: dict[int, Held] = {}
    limit = LAST_CALL_S if overdue else config.step_timeout_s
    began = asked = time.monotonic()
    while calls:
        for reference in ray.wait(list(calls), num_returns=len(calls), timeout=0.5)[0]:
            stage = calls.pop(reference)
            try:
                found[stage] = ray.get(reference)
            except RayError:
                pipeline.end_hanging(stage)  # dead, or no more to be trusted
        now = time.monotonic()
        silent: list[int] = []
        if calls and now - asked > config.health_timeout_s:
            asked = now
            silent = [stage for stage in pipeline.unresponsive(PING_S) if stage in calls.values()]
        for stage in list(calls.values()):
            if stage in silent or now - began > limit:
                announce(f"stage {stage} of {pipeline.name} hangs, and is ended")
                pipeline.end_hanging(stage)
        if now - began > limit + LAST_CALL_S:
            break
    return found


def find_room(lost: Sequence[tuple[Pipeline, int]], spares: Spares, patience_s: float, announce: Announce) -> int:
    """For how many of the lost stages there is a spare, or a place within some time, elsewhere if its node is dead."""
    spares.poll()
    room = min(spares.ready, len(lost))
    deadline = time.monotonic() + patience_s
    for pipeline, stage in lost[room:]:
        place = pipeline.places[stage]
        if place.is_lost:
            place.renew()
        while not place.wait(min(ANNOUNCE_EVERY_S, max(0.1, deadline - time.monotonic()))):
            if time.monotonic() > deadline:
                break
            announce(f"{pipeline.name}: waiting for room for stage {stage}")
        else:
            room += 1
    return room


def complete(pipeline: Pipeline, survivors: Mapping[int, Held], number: int, spares: Spares) -> list[Member]:
    """Survivors, and new actors until there are `number`; they are the pipeline's actors now."""
    own = dict(survivors)
    missing = max(0, number - len(own))
    for stage in [stage for stage in range(pipeline.num_stages) if stage not in own][:missing]:
        if not spares.stand_in(pipeline, stage):
            pipeline.replace(stage)
        pipeline.loaded.pop(stage, None)
        own[stage] = NOTHING
    members = []
    for stage, member in enumerate(members_of(pipeline)):
        if stage in own:
            member.held = own[stage]
            members.append(member)
        else:
            member.end()
    set_members(pipeline, members)
    return members
