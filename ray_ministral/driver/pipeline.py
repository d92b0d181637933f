"""`Pipeline`: the live stages of one replica. Starts them, watches over them, always takes them away again.

It knows actors and placement, not what they are for: captioning and training use it alike.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_ministral.config import STAGE_ENVIRONMENT, PipelineConfig
from ray_ministral.driver.cluster import Resolved
from ray_ministral.driver.stage_actor import LoadReport, StageStatus
from ray_ministral.errors import PlacementError, RayMinistralError, StageDiedError

ANNOUNCE_EVERY_S = 5.0
STATUS_TIMEOUT_S = 0.5  # for a line of progress
HEALTH_TIMEOUT_S = 15.0  # a stage that does not answer for so long is taken for hung

Announce = Callable[[str], None]


class Pipeline:
    """One replica: an actor for each stage, in one placement group. `generation` grows with each rebuild.

    The actors have `warm_up()`, `load(...) -> LoadReport`, and in a concurrency group of their own `status()`.
    """

    def __init__(self, name: str, group: PlacementGroup, actors: list[Any], generation: int) -> None:
        self.name = name
        self.generation = generation
        self._group = group
        self.actors = actors
        self.warm_ups: list[Any] = []
        self._loads: list[Any] = []
        self.reports: list[LoadReport] = []

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
        """Reserve room for all stages, start their actors, let them warm up; `load` tells them which stages they are.

        Raises `PlacementError` where the cluster has no room within `config.placement_timeout_s`.
        """
        group = placement_group([resolved.bundle] * num_stages, strategy="PACK")
        pipeline = cls(name, group, [], generation)
        try:
            _wait_for_room(name, group, resolved, num_stages, config.placement_timeout_s, announce)
            for index in range(num_stages):
                actor = actor_class.options(
                    num_cpus=resolved.threads,
                    num_gpus=1 if resolved.device == "cuda" else 0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
                    runtime_env={"env_vars": STAGE_ENVIRONMENT | {"OMP_NUM_THREADS": str(resolved.threads)}},
                ).remote()
                pipeline.actors.append(actor)
                pipeline.warm_ups.append(actor.warm_up.remote())  # what goes wrong here goes wrong in `load`, too
        except BaseException:
            pipeline.close()
            raise
        return pipeline

    def load(self, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Let the stages load in parallel, with the arguments of each, first to last; `wait_ready` waits for them."""
        self._loads = [actor.load.remote(*own) for actor, own in zip(self.actors, arguments, strict=True)]

    @property
    def num_stages(self) -> int:
        """Stages of this replica."""
        return len(self.actors)

    def wait_ready(self, timeout_s: float, announce: Announce) -> None:
        """Wait until all stages have their weights; says every few seconds what each is doing.

        Raises the stage's own error where it refuses the model, `StageDiedError` where it dies or takes too long.
        """
        deadline = time.monotonic() + timeout_s
        pending = list(self._loads)
        while pending:
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=ANNOUNCE_EVERY_S)
            self._raise_failed_loads()
            if not pending:
                break
            statuses = self.ask("status", STATUS_TIMEOUT_S)
            shown = ", ".join(_describe(index, status) for index, status in enumerate(statuses))
            announce(f"{self.name}: waiting for {len(pending)} of {self.num_stages} stages: {shown}")
            if time.monotonic() > deadline:
                raise StageDiedError(
                    f"{self.name}: stages were not ready after {timeout_s:.0f} s ({shown}): look at their logs, or "
                    "raise start_timeout_s for very slow storage"
                )
        self.reports = ray.get(self._loads)

    def ask(self, method: str, timeout_s: float) -> list[Any]:
        """What each stage answers within the time; None for one that does not, or that is dead."""
        answers = [getattr(actor, method).remote() for actor in self.actors]
        ray.wait(answers, num_returns=len(answers), timeout=timeout_s)
        return [_value(answer) for answer in answers]

    def unresponsive(self) -> list[int]:
        """Stages whose health group does not answer."""
        return [index for index, status in enumerate(self.ask("status", HEALTH_TIMEOUT_S)) if status is None]

    def death(self, error: RayActorError) -> StageDiedError:
        """What to raise for a stage that has died: which one, where, and Ray's reason, in one line."""
        index = next((i for i, actor in enumerate(self.actors) if actor._actor_id.hex() == error.actor_id), None)
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
            with suppress(Exception):
                ray.kill(actor, no_restart=True)
        with suppress(Exception):
            remove_placement_group(self._group)

    def _raise_failed_loads(self) -> None:
        for index, load in enumerate(self._loads):
            ready, _ = ray.wait([load], timeout=0)
            if ready:
                try:
                    ray.get(load)
                except RayTaskError as error:
                    raise_if_ours(error)
                    raise StageDiedError(f"{self.name}: stage {index} cannot load: {describe_error(error)}") from error
                except RayActorError as error:
                    raise self.death(error) from error


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


def _wait_for_room(
    name: str, group: PlacementGroup, resolved: Resolved, stages: int, timeout_s: float, announce: Announce
) -> None:
    needs = f"{stages} x {', '.join(f'{amount:g} {kind}' for kind, amount in resolved.bundle.items())}"
    deadline = time.monotonic() + timeout_s
    while not group.wait(timeout_seconds=min(ANNOUNCE_EVERY_S, timeout_s)):
        free, has = ray.available_resources(), ray.cluster_resources()
        offers = ", ".join(f"{free.get(kind, 0):g} of {has.get(kind, 0):g} {kind} free" for kind in resolved.bundle)
        if time.monotonic() > deadline:
            raise PlacementError(
                f"{name}: no room for {needs} within {timeout_s:.0f} s; the cluster has {offers}: use fewer --stages, "
                "--replicas or --threads-per-stage, or add nodes"
            )
        announce(f"{name}: waiting for room for {needs}; the cluster has {offers}")
