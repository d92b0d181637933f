"""Runs the stages of a training pipeline as threads of one process, with queues for a transport: all of the real code
but Ray and torch.distributed, in milliseconds."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_ministral.config import OptimizerConfig, StageSpec
from ray_ministral.model.architecture import is_tied
from ray_ministral.model.weights import load_chunk
from ray_ministral.pipeline.schedule import Schedule
from ray_ministral.training.lora import LoraOptions, add_adapters
from ray_ministral.training.plan import StageReport, TrainMicrobatch, TrainPlan
from ray_ministral.training.rates import clip_scale, global_norm
from ray_ministral.training.stage import TrainStage, gradients

TIMEOUT_S = 60.0


class QueueTransport:
    """Messages between threads; matched by sender, receiver and tag, as gloo does."""

    def __init__(self, queues: dict[tuple[int, int, int], queue.Queue[Tensor]], stage: int) -> None:
        self._queues, self._stage = queues, stage

    def send(self, tensor: Tensor, to_stage: int, tag: int) -> None:
        self._queues[self._stage, to_stage, tag].put(tensor.detach().clone())

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, from_stage: int, tag: int) -> Tensor:
        tensor = self._queues[from_stage, self._stage, tag].get(timeout=TIMEOUT_S)
        assert tuple(tensor.shape) == shape
        assert tensor.dtype == dtype
        return tensor

    def flush(self) -> None:
        return


class Pipeline:
    """`chunk_layers`: decoder layers of each chunk in order; chunk c lives on stage c % num_stages."""

    def __init__(
        self,
        model_dir: Path,
        chunk_layers: Sequence[int],
        num_stages: int,
        *,
        optimizer: OptimizerConfig | None = None,
        dtype: torch.dtype = torch.float32,
        freeze: tuple[bool, bool, bool] = (False, False, False),
        recompute: bool = False,
        pixel_table: Any = None,
        lora: LoraOptions | None = None,
        seed: int = 0,
    ) -> None:
        queues: dict[tuple[int, int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)
        self.num_stages, self.num_chunks = num_stages, len(chunk_layers)
        chunks: list[dict[int, Any]] = [{} for _ in range(num_stages)]
        start = 0
        for number, layers in enumerate(chunk_layers):
            spec = StageSpec(start, start + layers, number == 0, number == self.num_chunks - 1)
            chunk = load_chunk(model_dir, spec, dtype=dtype, share_output_layer=False)
            chunk.freeze(*freeze)
            if lora is not None:
                add_adapters(chunk, lora, seed)
            chunks[number % num_stages][number] = chunk
            start += layers
        self.stages = [
            TrainStage(
                chunks[stage],
                stage=stage,
                num_stages=num_stages,
                num_chunks=self.num_chunks,
                transport=QueueTransport(queues, stage),
                optimizer=optimizer or OptimizerConfig(),
                pixel_table=pixel_table if stage == 0 else None,
                recompute=recompute,
            )
            for stage in range(num_stages)
        ]

    @property
    def tied(self) -> bool:
        """Whether embedding and output layer are to stay one."""
        return is_tied(self.stages[0].chunks[0].hf_config)

    def trainable(self) -> tuple[bool, ...]:
        """Whether each chunk has weights to train."""
        return tuple(
            any(p.requires_grad for p in self.stages[c % self.num_stages].chunks[c].parameters())
            for c in range(self.num_chunks)
        )

    def compute(self, schedule: Schedule, microbatches: Sequence[TrainMicrobatch], *blocks: Any) -> list[StageReport]:
        """Phase one on all stages at once."""
        total = sum(microbatch.num_targets for microbatch in microbatches)
        plan = TrainPlan(0, 0, tuple(microbatches), (), max(1, total))
        reports: list[StageReport | BaseException | None] = [None] * self.num_stages

        def run(stage: int) -> None:
            try:
                own = replace(plan, actions=schedule.actions[stage])
                reports[stage] = self.stages[stage].compute(own, *(blocks if stage == 0 else ()))
            except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
                reports[stage] = error

        threads = [threading.Thread(target=run, args=(stage,)) for stage in range(self.num_stages)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        for report in reports:
            if isinstance(report, BaseException):
                raise report
        return [report for report in reports if isinstance(report, StageReport)]

    def step(
        self,
        schedule: Schedule,
        microbatches: Sequence[TrainMicrobatch],
        *blocks: Any,
        learning_rate: float,
        clip_norm: float | None,
    ) -> tuple[float, float]:
        """Both phases; the mean loss and the norm before clipping."""
        reports = self.compute(schedule, microbatches, *blocks)
        norms = {name: norm for report in reports for name, norm in report.squared_norms.items()}
        norm = global_norm(norms)
        for stage in self.stages:
            stage.commit(clip_scale(norm, clip_norm), learning_rate)
        total = sum(microbatch.num_targets for microbatch in microbatches)
        return sum(loss for report in reports for loss in report.losses) / max(1, total), norm

    def gradients(self) -> dict[str, Tensor]:
        """By Hugging Face name, after `compute`."""
        found: dict[str, Tensor] = {}
        for stage in self.stages:
            found.update(gradients(stage))
        return found

    def weights(self) -> dict[str, Tensor]:
        """By Hugging Face name."""
        from ray_ministral.model.weights import read_tensors

        found: dict[str, Tensor] = {}
        for stage in self.stages:
            for chunk in stage.chunks.values():
                found.update({name: tensor.clone() for name, tensor in read_tensors(chunk, lambda p: p.data)})
        return found
