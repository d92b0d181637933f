"""The thin Ray skin around a `TrainStage`. Like `StageActor` it imports nothing heavy until `warm_up`."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from ray_ministral.captioning.plan import StepPlan
from ray_ministral.config import SamplingConfig, StageOptions
from ray_ministral.driver.stage_actor import HEALTH, LoadReport, StageStatus
from ray_ministral.training.checkpoint import StagePart, TrainState, commit_checkpoint
from ray_ministral.training.files import TEMPORARY, put_in_place
from ray_ministral.training.plan import StageReport, TrainPlan, TrainStageOptions

if TYPE_CHECKING:
    from ray_ministral.captioning.stage import CaptionStage
    from ray_ministral.training.stage import TrainStage

GROUP_TIMEOUT_S = 600.0

FILES = "files"
"""Concurrency group of calls that write while the stage computes."""


class TrainActor:
    """One stage of one replica in training, in a process of its own. Which one it is, it learns in `load`."""

    def __init__(self) -> None:
        self._status = StageStatus("starting")
        self._stage: TrainStage | None = None
        self._import_seconds = 0.0
        self._store: Any = None
        self._captioning: dict[int, CaptionStage] = {}
        self._writing: Future[StagePart] | None = None

    def warm_up(self) -> None:
        """Import torch and megatron."""
        self._status = StageStatus("importing")
        started = time.perf_counter()
        from ray_ministral.training import build, snapshot  # noqa: F401

        self._import_seconds = time.perf_counter() - started

    def load(self, options: TrainStageOptions) -> LoadReport:
        """Read the chunks of a stage."""
        started = time.perf_counter()
        from ray_ministral.pipeline.stage import process_memory
        from ray_ministral.training.build import build_stage
        from ray_ministral.training.snapshot import BackgroundWriter

        self._options = options
        self._writer = BackgroundWriter()
        self._stage = build_stage(options, self._loading)
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
        return host, self._store.port

    def join(self, generation: int, address: tuple[str, int]) -> None:
        """Make the process groups of a generation with the other stages."""
        from ray_ministral.training.build import connect_stage

        connect_stage(
            self.stage,
            self._options,
            generation,
            address,
            own_store=self._store,
            host=ray.util.get_node_ip_address(),
            timeout_s=GROUP_TIMEOUT_S,
        )

    def compute(self, plan: TrainPlan, *blocks: Any) -> StageReport:
        """See `TrainStage.compute`."""
        return self.stage.compute(plan, *blocks)

    def commit(self, scale: float, learning_rate: float) -> tuple[float, float]:
        """See `TrainStage.commit`; when it began, in seconds since the epoch, and how many it took."""
        started, begun = time.time(), time.perf_counter()
        self.stage.commit(scale, learning_rate)
        return started, time.perf_counter() - begun

    def evaluate(self, plan: TrainPlan, *blocks: Any) -> tuple[float, ...]:
        """See `TrainStage.evaluate`."""
        return self.stage.evaluate(plan, *blocks)

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

    def restore(self, checkpoint: str) -> None:
        """Weights, masters and moments out of a checkpoint."""
        from ray_ministral.training.restore import load_stage

        load_stage(self.stage, Path(checkpoint))

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
