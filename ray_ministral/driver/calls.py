"""`Calls`: results of calls to the actors of a training job, within a deadline; one error where any of them fails."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ray_ministral.driver.pipeline import Pipeline, describe_error, raise_if_ours
from ray_ministral.errors import ClusterError, StageDiedError

CHECK_EVERY_S = 5.0


class Calls:
    """Of the stages of some replicas, and of `sampler`, the actor that prepares samples."""

    def __init__(self, replicas: Sequence[Pipeline], sampler: Any, timeout_s: float) -> None:
        self._replicas, self._sampler, self._timeout_s = replicas, sampler, timeout_s

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
            if pending and time.monotonic() > deadline:
                stuck = [f"stage {i} of {p.name}" for p in self._replicas for i in p.unresponsive()]
                raise StageDiedError(
                    f"{len(pending)} calls have not come back for {self._timeout_s:.0f} s; not answering: "
                    f"{', '.join(stuck) or 'none'}. Raise step_timeout_s if a step can take so long"
                )
        results: list[Any] = ray.get(references)
        return results

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
