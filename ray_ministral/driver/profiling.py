"""`Profiling`: the stages measure themselves before they load, all at once, and the model is cut by that.

It is never what a job ends by: where it fails or takes too long, FLOPs decide.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import RayError

from ray_ministral.captioning.costs import Shapes
from ray_ministral.config import CaptionConfig, StageOptions
from ray_ministral.driver.cluster import Resolved
from ray_ministral.driver.feeder import Feeder
from ray_ministral.driver.pipeline import Pipeline, describe_error
from ray_ministral.driver.places import ANNOUNCE_EVERY_S, Announce
from ray_ministral.driver.split import Split
from ray_ministral.model.architecture import Architecture

logger = logging.getLogger(__name__)

FIRST_ROWS_S = 5.0
"""Longest wait for the first rows once the stages have imported: they say what images and prompts are like."""

PROFILE_S = 30.0
"""Longest wait for the measurements; a stage gives its own up before, see `profile.LONGEST_S`."""


@dataclass
class Profiling:
    """What it takes to measure. `rows` are those that are still to be captioned, `seconds` what it took."""

    config: CaptionConfig
    arch: Architecture
    model_dir: str
    rows: int
    resolved: Resolved
    announce: Announce
    seconds: float = 0.0

    def choose(self, split: Split, pipelines: Sequence[Pipeline], feeder: Feeder) -> Split:
        """`split`, or a measured one; raises what is wrong with the input, never what is wrong with the measurement."""
        if not split.is_to_be_measured:
            return split
        if not self._imported(pipelines):
            return split  # what hinders it, is said by who waits for the stages to load
        started = time.monotonic()
        prepared = feeder.peek(FIRST_ROWS_S)
        pipeline, sampling = self.config.pipeline, self.config.sampling
        shapes = Shapes.of(() if prepared is None else prepared.chunk.rows, self.rows, self.arch, pipeline, sampling)
        options = [
            StageOptions(self.model_dir, spec, self.resolved.device, self.resolved.dtype, self.resolved.threads)
            for spec in split.partition.stages
        ]
        try:
            answers = [
                actor.profile.remote(own, sampling, shapes)
                for replica in pipelines
                for actor, own in zip(replica.actors, options, strict=True)
            ]
            _, late = ray.wait(answers, num_returns=len(answers), timeout=PROFILE_S)
            if late:
                raise TimeoutError(f"{len(late)} of {len(answers)} stages have not answered within {PROFILE_S:.0f} s")
            return split.measured(ray.get(answers), shapes)
        except (AttributeError, RayError, TimeoutError, ValueError) as error:
            logger.warning("stages cannot be measured, cutting the model by FLOPs: %s", describe_error(error))
            return split
        finally:
            self.seconds = time.monotonic() - started

    def _imported(self, pipelines: Sequence[Pipeline]) -> bool:
        """Wait until all stages can compute; False where one fails, or takes too long."""
        warm_ups = [warm_up for pipeline in pipelines for warm_up in pipeline.warm_ups]
        waiting = warm_ups
        deadline = time.monotonic() + self.config.pipeline.start_timeout_s
        while waiting and time.monotonic() < deadline:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=ANNOUNCE_EVERY_S)
            if waiting:
                self.announce(f"waiting for {len(waiting)} stages to import, before they are measured")
        try:
            ray.get([] if waiting else warm_ups)
        except RayError:
            return False
        return not waiting
