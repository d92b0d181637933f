"""`Saver`: checkpoints of a run, written by the stages beside training, committed when all of them are done."""

from __future__ import annotations

from typing import Any

import ray

from ray_ministral.driver.evaluation import Get
from ray_ministral.driver.pipeline import Pipeline
from ray_ministral.driver.train_job import TrainJob
from ray_ministral.driver.train_resume import CHECKPOINTS
from ray_ministral.training.checkpoint import prune, temporary_folder


class Saver:
    """One checkpoint at a time; the next one waits for the one before. `get` gives results of calls, or raises."""

    def __init__(self, job: TrainJob, pipeline: Pipeline, get: Get) -> None:
        self._job, self._pipeline, self._get = job, pipeline, get
        self._folder = job.output / CHECKPOINTS
        self._step = 0
        self._temporary = ""
        self._parts: list[Any] = []
        self._commit: Any = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is under way."""
        return bool(self._parts) or self._commit is not None

    def begin(self, done: int) -> None:
        """A checkpoint after `done` steps; returns when the stages may go on."""
        self.finish()
        self._step = done
        self._temporary = str(temporary_folder(self._folder, done, self._pipeline.generation))
        self._get([actor.save.remote(self._temporary) for actor in self._pipeline.actors])
        self._parts = [actor.written.remote() for actor in self._pipeline.actors]

    def poll(self) -> None:
        """Take what is ready a step further; does not wait. Raises what went wrong with writing."""
        if self._parts and _all_ready(self._parts):
            self._start_commit()
        if self._commit is not None and _all_ready([self._commit]):
            self._end_commit()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun, if any, is committed."""
        if self._parts:
            self._start_commit()
        if self._commit is not None:
            self._end_commit()

    def abandon(self, timeout_s: float) -> None:
        """After a loss: take no checkpoint further. Waits for a commit under way, whatever becomes of it."""
        if self._commit is not None:
            ray.wait([self._commit], timeout=timeout_s)
        self._parts, self._commit = [], None

    def _start_commit(self) -> None:
        parts, self._parts = self._get(self._parts), []
        state = self._job.state(self._step)
        self._commit = self._pipeline.actors[0].commit_checkpoint.remote(self._temporary, parts, state)

    def _end_commit(self) -> None:
        self._get([self._commit])
        self._commit = None
        prune(self._folder, self._job.config.keep_checkpoints)


def _all_ready(references: list[Any]) -> bool:
    return len(ray.wait(references, num_returns=len(references), timeout=0)[0]) == len(references)
