"""`Pipeline`: the live stages of one replica. Starts them, watches over them, always takes them away again.

It knows actors and placement, not what they are for: captioning and training use it alike.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.experimental import get_object_locations
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ministral.config import STAGE_ENVIRONMENT, PipelineConfig
from ray_ministral.driver.cluster import Resolved, alive_nodes
from ray_ministral.driver.places import Announce, Place, reserve_places
from ray_ministral.driver.stage_actor import LoadReport, StageStatus
from ray_ministral.errors import RayMinistralError, StageDiedError

STATUS_TIMEOUT_S = 0.5  # for a line of progress
SMALL_BYTES = 1_000_000
"""More than Ray sends with an answer (100 kB by default)."""
SMALL_TIMEOUT_S = 1.0

HEALTH_TIMEOUT_S = 15.0  # a stage that does not answer for so long is taken for hung


@dataclass(frozen=True, eq=False)
class NewActor:
    """Starts the actor of a stage at a place, and lets it warm up: `(actor, warm_up)`."""

    actor_class: Any
    resolved: Resolved

    def __call__(self, place: Place) -> tuple[Any, Any]:
        """Waits for nothing: where there is no room yet, the actor starts when there is."""
        resolved = self.resolved
        actor = self.actor_class.options(
            num_cpus=resolved.threads,
            num_gpus=1 if resolved.device == "cuda" else 0,
            scheduling_strategy=place.strategy,
            runtime_env={"env_vars": STAGE_ENVIRONMENT | {"OMP_NUM_THREADS": str(resolved.threads)}},
        ).remote()
        return actor, actor.warm_up.remote()  # what goes wrong there goes wrong in `load`, too


class Pipeline:
    """One replica: an actor for each stage. `generation` grows with each rebuild.

    The actors have `warm_up()`, `load(...) -> LoadReport`, and in a concurrency group of their own `status()`. A
    spare that stands in brings its place with it.
    """

    def __init__(self, name: str, places: Sequence[Place], new_actor: NewActor, generation: int) -> None:
        self.name = name
        self.generation = generation
        self.places = list(places)
        self.new_actor = new_actor
        self.actors: list[Any] = []
        self.warm_ups: list[Any] = []
        self.loaded: dict[int, LoadReport] = {}

    @classmethod
    def start(
        cls,
        name: str,
        *,
        actor_class: Any,
        num_stages: int,
        config: PipelineConfig,
        resolved: Resolved,
        announce: Announce,
        generation: int = 0,
    ) -> Pipeline:
        """Reserve room for all stages, start their actors, let them warm up. The caller tells them who they are.

        Raises `PlacementError` where the cluster has no room within `config.placement_timeout_s`.
        """
        places = reserve_places(name, resolved, num_stages, config.placement_timeout_s, announce)
        pipeline = cls(name, places, NewActor(actor_class, resolved), generation)
        try:
            for place in places:
                actor, warm_up = pipeline.new_actor(place)
                pipeline.actors.append(actor)
                pipeline.warm_ups.append(warm_up)
        except BaseException:
            pipeline.close()
            raise
        return pipeline

    @property
    def num_stages(self) -> int:
        """Stages of this replica."""
        return len(self.actors)

    def not_ready(self, timeout_s: float, shown: str) -> StageDiedError:
        """What to raise where stages take too long to start; `shown` is their `progress`."""
        return StageDiedError(
            f"{self.name}: stages were not ready after {timeout_s:.0f} s ({shown}): look at their logs, or raise "
            "start_timeout_s for very slow storage"
        )

    def cannot_load(self, stage: int, error: RayTaskError) -> StageDiedError:
        """What to raise for a stage whose `load` failed. Raises the stage's own error where it refuses the model."""
        raise_if_ours(error)
        return StageDiedError(f"{self.name}: stage {stage} cannot load: {describe_error(error)}")

    def progress(self) -> str:
        """What each stage is doing, for people. Takes half a second at most."""
        statuses = self.ask("status", STATUS_TIMEOUT_S)
        return ", ".join(_describe(index, status) for index, status in enumerate(statuses))

    def end_hanging(self, index: int) -> None:
        """End the process of a stage that does not do so itself: by Ray, and by its pid where that is known."""
        end_actor(self.actors[index])
        report = self.loaded.pop(index, None)
        if report is not None:
            end_process.options(scheduling_strategy=NodeAffinitySchedulingStrategy(report.node_id, soft=False)).remote(
                report.pid
            )

    def replace(self, index: int) -> None:
        """Start another actor for a stage whose actor is dead, or is ended now; elsewhere if its node is dead, too."""
        end_actor(self.actors[index])
        if self.places[index].is_lost:
            self.places[index].renew()
        self.actors[index], self.warm_ups[index] = self.new_actor(self.places[index])

    def stage_of(self, error: RayActorError) -> int | None:
        """The stage whose actor an error is about."""
        return next((i for i, actor in enumerate(self.actors) if actor._actor_id.hex() == error.actor_id), None)

    def ask(self, method: str, timeout_s: float) -> list[Any]:
        """What each stage answers within the time; None for one that does not, or that is dead."""
        answers = [getattr(actor, method).remote() for actor in self.actors]
        ray.wait(answers, num_returns=len(answers), timeout=timeout_s)
        return [_value(answer) for answer in answers]

    def unresponsive(self, timeout_s: float = HEALTH_TIMEOUT_S) -> list[int]:
        """Stages whose health group does not answer."""
        return [index for index, status in enumerate(self.ask("status", timeout_s)) if status is None]

    def death(self, error: RayActorError) -> StageDiedError:
        """What to raise for a stage that has died: which one, where, and Ray's reason, in one line."""
        index = self.stage_of(error)
        stage = "a stage" if index is None else f"stage {index}"
        where = re.search(r"\spid: (\d+).*\sip: (\S+)", str(error), re.DOTALL)
        process = f" (process {where[1]} on {where[2]})" if where else ""
        # Ray's last line has its reason, and then what commonly causes such a thing.
        reason = str(error).strip().splitlines()[-1].partition(" Some common causes")[0].rstrip(".")
        if "worker process has died" in reason:
            hint = "a process that is killed without a word was often short of memory: try more --stages"
        elif "ModuleNotFoundError" in reason:
            hint = "install it in the Python of all nodes, or send the job with `ray job submit --working-dir`"
        else:
            hint = "its log in Ray's session folder may say more"
        return StageDiedError(f"{stage} of {self.name} died{process}: {reason}; {hint}")

    def close(self) -> None:
        """End the actors and give the room back. Never raises: it runs while something else is being raised."""
        for actor in self.actors:
            end_actor(actor)
        for place in self.places:
            place.give_back()


@ray.remote(num_cpus=0, max_retries=0)
def end_process(pid: int) -> None:
    """Runs on the node of a process of Ray's that is to be ended, stopped or not."""
    with suppress(OSError):
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)


def end_actor(actor: Any) -> None:
    """End an actor's process, also one that is stopped. Never raises."""
    with suppress(Exception):
        ray.kill(actor, no_restart=True)


def is_ready(reference: Any) -> bool:
    """Whether a result is there; does not wait."""
    ready, _ = ray.wait([reference], timeout=0)
    return bool(ready)


def has_succeeded(reference: Any) -> bool:
    """Whether a call has come to its end, and not to an error; does not wait."""
    if not is_ready(reference):
        return False
    try:
        ray.get(reference)
    except RayError:
        return False
    return True


def lost_objects(references: Collection[Any]) -> set[Any]:
    """Those that no node of the cluster has any more. Small ones came to this process with the answer to their call."""
    alive = alive_nodes()
    places = get_object_locations(list(references))
    without = {ref: place["object_size"] for ref, place in places.items() if not alive.intersection(place["node_ids"])}
    small = [reference for reference, size in without.items() if size is not None and size <= SMALL_BYTES]
    with_us = ray.wait(small, num_returns=len(small), timeout=SMALL_TIMEOUT_S)[0] if small else []
    return without.keys() - {reference for reference in with_us if has_succeeded(reference)}


def root_cause(error: BaseException) -> BaseException:
    """What was raised in the actor: under Ray's wrapper there may be another, when a stage got a failed input."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def raise_if_ours(error: BaseException) -> None:
    """Raise the root cause where it is an error of this package, which says by itself what is to be changed."""
    cause = root_cause(error)
    if isinstance(cause, RayMinistralError):
        raise cause from None


def describe_error(error: BaseException) -> str:
    """Type and first line of the root cause."""
    cause = root_cause(error)
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0]}"


def _value(answer: Any) -> Any:
    try:
        return ray.get(answer, timeout=0)
    except (GetTimeoutError, RayError):
        return None


def _describe(index: int, status: StageStatus | None) -> str:
    if status is None:
        return f"stage {index} not up yet"
    if status.total_bytes:
        return f"stage {index} {status.phase} ({status.loaded_bytes / 1e6:.0f} of {status.total_bytes / 1e6:.0f} MB)"
    return f"stage {index} {status.phase}"
