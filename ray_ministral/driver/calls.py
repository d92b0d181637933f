"""`Calls`: results of calls to the actors of a training job, within a deadline; one error where any of them fails."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ray_ministral.config import PipelineConfig
from ray_ministral.driver.pipeline import Pipeline, describe_error, is_ready, raise_if_ours
from ray_ministral.errors import ClusterError, StageDiedError

CHECK_EVERY_S = 5.0


class Calls:
    """Of the stages of some replicas, and of `sampler`, the actor that prepares samples."""

    def __init__(self, replicas: Sequence[Pipeline], sampler: Any, config: PipelineConfig) -> None:
        self._replicas, self._sampler = replicas, sampler
        self._timeout_s, self._health_timeout_s = config.step_timeout_s, config.health_timeout_s
        self._asked: dict[Any, tuple[Any, float]] = {}
        self.is_overdue = False
        """Whether calls have come to their deadline: what does not come back then never will."""

    def everywhere(self, method: str, *arguments: Any) -> list[Any]:
        """The same call to every stage of every replica, at once; the results, replica by replica."""
        return self.get(self.start(method, *arguments))

    def start(self, method: str, *arguments: Any) -> list[Any]:
        """As `everywhere`, but references."""
        actors = [actor for pipeline in self._replicas for actor in pipeline.actors]
        return [getattr(actor, method).remote(*arguments) for actor in actors]

    def get(self, references: list[Any]) -> list[Any]:
        """Results, in order. One error with its root cause where any call failed, `StageDiedError` at the deadline."""
        deadline = time.monotonic() + self._timeout_s
        pending = list(references)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=CHECK_EVERY_S)
            for reference in done:
                self._raise_failure(reference)
            if pending:
                self._end_silent()
            if pending and time.monotonic() > deadline:
                self.is_overdue = True
                stuck = [f"stage {i} of {p.name}" for p in self._replicas for i in p.unresponsive()]
                raise StageDiedError(
                    f"{len(pending)} calls have not come back for {self._timeout_s:.0f} s; not answering: "
                    f"{', '.join(stuck) or 'none'}. Raise step_timeout_s if a step can take so long"
                )
        results: list[Any] = ray.get(references)
        return results

    def _end_silent(self) -> None:
        """Ask all stages how they are, now and then. Raises for one that hangs, whose process is ended.

        A stage answers in a thread of its own, whatever it computes. Those that wait for it learn when it is gone.
        """
        now = time.monotonic()
        for pipeline in self._replicas:
            for stage, actor in enumerate(pipeline.actors):
                if stage not in pipeline.loaded:
                    continue  # it may wait for room, or import
                answer, asked = self._asked.get(actor, (None, now - CHECK_EVERY_S))
                if answer is not None and is_ready(answer):
                    answer = None
                if answer is None and now - asked >= CHECK_EVERY_S:
                    answer, asked = actor.status.remote(), now
                self._asked[actor] = answer, asked
                if answer is not None and now - asked > self._health_timeout_s:
                    pipeline.end_hanging(stage)
                    raise StageDiedError(
                        f"stage {stage} of {pipeline.name} has not answered for {now - asked:.0f} s "
                        f"(health_timeout_s is {self._health_timeout_s:g}), and was ended"
                    )
        self._asked = {actor: held for actor, held in self._asked.items() if held[1] > now - 2 * self._timeout_s}

    def _raise_failure(self, reference: Any) -> None:
        try:
            ray.get(reference)
        except RayTaskError as error:
            raise_if_ours(error)
            raise ClusterError(f"a step failed: {describe_error(error)}") from error
        except RayActorError as error:
            if self._sampler._actor_id.hex() == error.actor_id:
                raise ClusterError(f"the actor that prepares samples died: {describe_error(error)}") from error
            for pipeline in self._replicas:
                if any(actor._actor_id.hex() == error.actor_id for actor in pipeline.actors):
                    raise pipeline.death(error) from error
            raise StageDiedError(f"a stage died: {describe_error(error)}") from error
        except RayError as error:
            raise ClusterError(f"a step was lost: {describe_error(error)}") from error
