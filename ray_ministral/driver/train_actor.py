"""The thin Ray skin around a `TrainStage`. Like `StageActor` it imports nothing heavy until `warm_up`."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import ray

from ray_ministral.captioning.plan import StepPlan
from ray_ministral.config import SamplingConfig, StageOptions
from ray_ministral.driver.stage_actor import HEALTH, LoadReport, StageStatus
from ray_ministral.errors import ClusterError, UsageError
from ray_ministral.training.checkpoint import StagePart, TrainState, commit_checkpoint
from ray_ministral.training.files import TEMPORARY, put_in_place
from ray_ministral.training.migration import Piece
from ray_ministral.training.plan import StageReport, TrainPlan, TrainStageOptions

if TYPE_CHECKING:
    from ray_ministral.captioning.stage import CaptionStage
    from ray_ministral.training.pieces import Parcel, PieceState
    from ray_ministral.training.stage import TrainStage

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

GROUP_TIMEOUT_S = 600.0

FILES = "files"
"""Concurrency group of calls that write while the stage computes."""


@dataclass(frozen=True)
class Held:
    """What a stage has: its pieces, those that are trained, and after how many steps; None: it is in between."""

    done: int | None
    pieces: frozenset[Piece]
    trained: frozenset[Piece]


class TrainActor:
    """One stage of one replica in training, in a process of its own. Which one it is, it learns in `load`."""

    def __init__(self) -> None:
        self._status = StageStatus("starting")
        self._stage: TrainStage | None = None
        self._done: int | None = None
        self._import_seconds = 0.0
        self._store: Any = None
        self._address: tuple[str, int] | None = None
        self._captioning: dict[int, CaptionStage] = {}
        self._writing: Future[StagePart] | None = None

    def warm_up(self) -> None:
        """Import torch and megatron."""
        self._status = StageStatus("importing")
        started = time.perf_counter()
        from ray_ministral.training import build, snapshot  # noqa: F401

        self._import_seconds = time.perf_counter() - started

    def load(self, options: TrainStageOptions, done: int | None = None) -> LoadReport:
        """Read the chunks of a stage, which is its state after `done` steps; None: it gets that by `change`."""
        started = time.perf_counter()
        from ray_ministral.pipeline.stage import process_memory
        from ray_ministral.training.build import build_stage
        from ray_ministral.training.snapshot import BackgroundWriter

        self._stage, self._done = None, None  # the memory of what it was before
        self._options = options
        self._writer = BackgroundWriter()
        self._stage = build_stage(options, self._loading)
        self._done = done
        size = sum(p.nbytes for chunk in self._stage.chunks.values() for p in chunk.parameters())
        self._status = StageStatus("ready", size, size)
        return LoadReport(
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
            import_seconds=self._import_seconds,
            load_seconds=time.perf_counter() - started,
            parameter_bytes=size,
            peak_rss_bytes=process_memory()["peak_rss"],
        )

    def _loading(self, done: int, total: int) -> None:
        self._status = StageStatus("loading", done, total)

    @property
    def stage(self) -> TrainStage:
        """After `load`."""
        assert self._stage is not None, "load() comes first"
        return self._stage

    def serve_store(self) -> tuple[str, int]:
        """Open the store at which all stages meet; its address."""
        from ray_ministral.pipeline.transport import serve_store

        host = ray.util.get_node_ip_address()
        self._store = serve_store(host, GROUP_TIMEOUT_S)
        self._address = host, self._store.port
        return self._address

    def join(self, generation: int, address: tuple[str, int]) -> None:
        """Make the process groups of a generation with the other stages."""
        from ray_ministral.training.build import connect_stage

        connect_stage(
            self.stage,
            self._options,
            generation,
            address,
            own_store=self._store if address == self._address else None,
            host=ray.util.get_node_ip_address(),
            timeout_s=GROUP_TIMEOUT_S,
        )

    def compute(self, plan: TrainPlan, *blocks: Any) -> StageReport:
        """See `TrainStage.compute`. Raises `ClusterError` where a neighbour is lost."""
        return self._with_neighbours(lambda: self.stage.compute(plan, *blocks))

    def commit(
        self, done: int, scale: float | None, learning_rate: float, *, copied: bool
    ) -> tuple[tuple[float, float], dict[Piece, PieceState] | None]:
        """See `TrainStage.commit`, which makes it `done` steps; without a `scale` a step that changes nothing.

        When it began, in seconds since the epoch, and how many it took; if `copied`, the trained state afterwards.
        """
        from ray_ministral.training.pieces import give

        started, begun = time.time(), time.perf_counter()
        self._done = None  # neither before nor after
        if scale is not None:
            self.stage.commit(scale, learning_rate)
        self._done = done
        copy = give(self.stage, checked=False) if copied else None
        return (started, time.perf_counter() - begun), copy

    def evaluate(self, plan: TrainPlan, *blocks: Any) -> tuple[float, ...]:
        """See `TrainStage.evaluate`. Raises as `compute` does."""
        return self._with_neighbours(lambda: self.stage.evaluate(plan, *blocks))

    def _with_neighbours(self, work: Callable[[], Result]) -> Result:
        """Work that waits for other stages. If one is lost, this one hangs up, so that those that wait for it learn.

        The error is raised anew, for its traceback holds what holds the connections.
        """
        try:
            return work()
        except UsageError:
            raise
        except Exception as error:
            logger.exception("a step failed")
            cause = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        self._hang_up()
        raise ClusterError(f"stage {self._options.stage} could not do its part of a step: {cause}")

    def _hang_up(self) -> None:
        self.stage.forget()
        self.stage.connect(None)
        gc.collect()

    def void(self) -> Held:
        """Forget a step that is under way, and the other stages; what is there then."""
        self._captioning.clear()
        if self._stage is not None:
            self._hang_up()
            self._stage.discard()
        if self._writing is not None:
            wait([self._writing])  # its files are removed with the attempt, and are not to come after that
        return self.held()

    def held(self) -> Held:
        """What is there of the state, after how many steps."""
        from ray_ministral.training.migration import piece_of, pieces_of

        if self._stage is None:
            return Held(None, frozenset(), frozenset())
        pieces = pieces_of([chunk.stage for chunk in self._stage.chunks.values()])
        return Held(self._done, pieces, frozenset(map(piece_of, self._stage.optimizer.parameters)))

    def give(self, pieces: Sequence[Piece]) -> tuple[None, dict[Piece, PieceState]]:
        """The state of some pieces, to be sent to other stages; None is what says that it is there."""
        from ray_ministral.training.pieces import give

        return None, give(self.stage, pieces)

    def change(self, options: TrainStageOptions, done: int, again: Collection[Piece], *parcels: Parcel) -> None:
        """Become another stage of another cut, after `done` steps, with what others gave.

        again: pieces that are here, as they were after other steps. Raises `PieceError`.
        """
        from ray_ministral.training.build import rebuild_stage
        from ray_ministral.training.pieces import take

        source = f"after {done} steps, for stage {options.stage} of {options.num_stages}"
        self._hang_up()
        self._captioning.clear()
        before, self._stage, self._done = self.stage, None, None
        stage = rebuild_stage(before, options, parcels, source)
        take(stage, again, parcels, source)
        self._stage, self._options, self._done = stage, options, done
        del before
        gc.collect()

    def start_captions(self, sampling: SamplingConfig, kv_tokens_per_microbatch: int) -> None:
        """Put a `CaptionStage` around each chunk as it is; its weights are the ones that are trained."""
        from ray_ministral.captioning.stage import CaptionStage

        options = self._options
        for number, spec in options.chunks:
            own = StageOptions(options.model_dir, spec, options.device, options.dtype, options.threads)
            caption_stage = CaptionStage(own, sampling, kv_tokens_per_microbatch)
            caption_stage.use(self.stage.chunks[number])
            self._captioning[number] = caption_stage

    def caption_step(self, chunk: int, plan: StepPlan, hidden: np.ndarray | None, *blocks: Any) -> np.ndarray:
        """See `CaptionStage.step`, of one chunk."""
        return self._captioning[chunk].step(plan, hidden, *blocks)

    def end_captions(self) -> None:
        """Give the memory of the KV caches back."""
        self._captioning.clear()

    def trainable(self) -> dict[int, bool]:
        """Whether each of its chunks has weights to train."""
        return {
            number: any(parameter.requires_grad for parameter in chunk.parameters())
            for number, chunk in self.stage.chunks.items()
        }

    def save(self, folder: str) -> None:
        """Begin to write its files of a checkpoint as of now. Training may go on; `written` waits for the end."""
        self._writing = self._writer.save(self.stage, Path(folder))

    @ray.method(concurrency_group=FILES)
    def written(self) -> StagePart:
        """Wait for what `save` has begun. Raises OSError."""
        assert self._writing is not None, "save() comes first"
        return self._writing.result()

    @ray.method(concurrency_group=FILES)
    def commit_checkpoint(self, folder: str, parts: Sequence[StagePart], state: TrainState) -> str:
        """When all stages have saved into `folder`: add the rest and give it its name."""
        from ray_ministral.training.lora import LoraOptions

        options = self._options
        lora = None if options.lora_rank is None else LoraOptions(options.lora_rank, options.lora_alpha)
        config = next(iter(self.stage.chunks.values())).hf_config
        done = commit_checkpoint(Path(folder), parts, state, config=config, model_dir=options.model_dir, lora=lora)
        return str(done)

    def merge(self, adapters: str, output: str) -> None:
        """Write the model that training began with, merged with saved adapters; `output` gives way when it is there."""
        from ray_ministral.training.lora import merge_adapters

        destination = Path(output)
        merged = destination.with_name(f"{TEMPORARY}merged")
        shutil.rmtree(merged, ignore_errors=True)
        merge_adapters(self._options.model_dir, adapters, merged)
        put_in_place(merged, destination)

    @ray.method(concurrency_group=HEALTH)
    def status(self) -> StageStatus:
        """Answers at once, whatever the stage is doing."""
        return self._status


def train_actor_class() -> Any:
    """`TrainActor` as a Ray actor class; Ray restarts and retries nothing."""
    remote: Any = ray.remote  # its type stubs lack concurrency groups
    return remote(max_restarts=0, max_task_retries=0, concurrency_groups={HEALTH: 1, FILES: 1})(TrainActor)
