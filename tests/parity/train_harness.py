"""Runs the stages of a training pipeline as threads of one process, with queues for a transport: all of the real code
but Ray and torch.distributed, in milliseconds."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_ministral.config import Freezable, OptimizerConfig, StageSpec
from ray_ministral.model.architecture import is_tied
from ray_ministral.model.weights import load_chunk
from ray_ministral.pipeline.partition import Partition
from ray_ministral.pipeline.schedule import Schedule
from ray_ministral.training.build import build_stage, rebuild_stage
from ray_ministral.training.lora import LoraOptions, add_adapters
from ray_ministral.training.migration import Migration, pieces_of, plan_migration
from ray_ministral.training.pieces import give, take
from ray_ministral.training.plan import StageReport, TrainMicrobatch, TrainPlan, TrainStageOptions
from ray_ministral.training.rates import clip_scale, global_norm
from ray_ministral.training.stage import TrainStage, gradients

TIMEOUT_S = 60.0


class QueueTransport:
    """Messages between threads; matched by sender, receiver and tag, as gloo does."""

    def __init__(self, queues: dict[tuple[int, int, int], queue.Queue[Tensor]], stage: int) -> None:
        self._queues, self._stage = queues, stage

    def _queue(self, sender: int, receiver: int, tag: int) -> queue.Queue[Tensor]:
        # `setdefault` is atomic. With a defaultdict, a sender and a receiver that come at once can each make a queue,
        # and the message lies in the one that nobody reads.
        return self._queues.setdefault((sender, receiver, tag), queue.Queue())

    def send(self, tensor: Tensor, to_stage: int, tag: int) -> None:
        self._queue(self._stage, to_stage, tag).put(tensor.detach().clone())

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, from_stage: int, tag: int) -> Callable[[], Tensor]:
        def wait() -> Tensor:
            tensor = self._queue(from_stage, self._stage, tag).get(timeout=TIMEOUT_S)
            assert tuple(tensor.shape) == shape
            assert tensor.dtype == dtype
            return tensor

        return wait

    def flush(self) -> None:
        return


class Meeting:
    """Where the replicas of one stage add up, in the order of their numbers."""

    def __init__(self, replicas: int) -> None:
        self.tensors: list[Tensor] = [torch.empty(0)] * replicas
        self.barrier = threading.Barrier(replicas)


class ThreadTwins:
    """One replica's way to its twins."""

    def __init__(self, meeting: Meeting, replica: int) -> None:
        self._meeting, self._replica = meeting, replica

    def add_up(self, tensor: Tensor) -> None:
        self._meeting.tensors[self._replica] = tensor.clone()
        self._meeting.barrier.wait(TIMEOUT_S)
        first, *others = self._meeting.tensors
        total = first.clone()
        for other in others:
            total.add_(other)
        self._meeting.barrier.wait(TIMEOUT_S)
        tensor.copy_(total)


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
        twins: Sequence[ThreadTwins] | None = None,
    ) -> None:
        self._model_dir, self._freeze, self._lora, self._dtype = model_dir, freeze, lora, dtype
        self._optimizer, self._recompute, self._seed = optimizer or OptimizerConfig(), recompute, seed
        queues: dict[tuple[int, int, int], queue.Queue[Tensor]] = {}
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
                twins=None if twins is None else twins[stage],
                optimizer=self._optimizer,
                pixel_table=pixel_table if stage == 0 else None,
                recompute=recompute,
            )
            for stage in range(num_stages)
        ]

    def options(self, chunk_layers: Sequence[int], num_stages: int) -> list[TrainStageOptions]:
        """What stages of another cut are made with."""
        chunks = tuple(enumerate(Partition.from_layers(chunk_layers, sum(chunk_layers)).stages))
        parts: tuple[Freezable, ...] = ("language", "vision", "projector")
        return [
            TrainStageOptions(
                model_dir=str(self._model_dir),
                chunks=chunks[stage::num_stages],
                stage=stage,
                num_stages=num_stages,
                num_chunks=len(chunks),
                replica=0,
                num_replicas=1,
                device="cpu",
                dtype="bfloat16" if self._dtype == torch.bfloat16 else "float32",
                threads=1,
                optimizer=self._optimizer,
                freeze=tuple(part for part, frozen in zip(parts, self._freeze, strict=False) if frozen),
                lora_rank=None if self._lora is None else self._lora.rank,
                lora_alpha=None if self._lora is None else self._lora.alpha,
                recompute=self._recompute,
                seed=self._seed,
            )
            for stage in range(num_stages)
        ]

    def change(self, chunk_layers: Sequence[int], num_stages: int) -> Migration:
        """Another cut between two steps: pieces move as `Trainer` moves them, the other tensors stay where they are."""
        options = self.options(chunk_layers, num_stages)
        old = [*self.stages, *[None] * max(0, num_stages - self.num_stages)]
        held = [frozenset() if stage is None else pieces_of([c.stage for c in stage.chunks.values()]) for stage in old]
        wanted = [pieces_of([spec for _, spec in own.chunks]) for own in options]
        plan = plan_migration(held, wanted, dict.fromkeys(set().union(*wanted), 1))
        given: dict[int, list[Any]] = {}
        for move in plan.moves:
            source = old[move.source]
            assert source is not None
            given.setdefault(move.target, []).append(copy.deepcopy(give(source, move.pieces)))
        queues: dict[tuple[int, int, int], queue.Queue[Tensor]] = {}
        stages = []
        for own, place in zip(options, plan.places, strict=True):
            before = old[place]
            if before is None:
                stage = build_stage(own)
                take(stage, wanted[own.stage], given[place], "a test")
            else:
                stage = rebuild_stage(before, own, given.get(place, []), "a test")
            stage.connect(QueueTransport(queues, own.stage))
            stages.append(stage)
        self.stages, self.num_stages, self.num_chunks = stages, num_stages, len(chunk_layers)
        return plan

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
        return compute_on([self], [schedule], [microbatches], *blocks)

    def step(
        self,
        schedule: Schedule,
        microbatches: Sequence[TrainMicrobatch],
        *blocks: Any,
        learning_rate: float,
        clip_norm: float | None,
    ) -> tuple[float, float]:
        """Both phases; the mean loss and the norm before clipping."""
        return step_on([self], [schedule], [microbatches], *blocks, learning_rate=learning_rate, clip_norm=clip_norm)

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


def make_replicas(number: int, *arguments: Any, num_stages: int, **options: Any) -> list[Pipeline]:
    """Pipelines whose stages add their gradients up; arguments as of `Pipeline`."""
    meetings = [Meeting(number) for _ in range(num_stages)]
    return [
        Pipeline(*arguments, num_stages, twins=[ThreadTwins(meeting, replica) for meeting in meetings], **options)
        for replica in range(number)
    ]


def compute_on(
    replicas: Sequence[Pipeline],
    schedules: Sequence[Schedule | None],
    microbatches: Sequence[Sequence[TrainMicrobatch]],
    *blocks: Any,
) -> list[StageReport]:
    """Phase one on all stages of all replicas at once; reports of the first replica's stages, then the next one's.

    A replica without microbatches has no schedule.
    """
    total = sum(microbatch.num_targets for own in microbatches for microbatch in own)
    reports: dict[tuple[int, int], StageReport | BaseException] = {}

    def run(replica: int, stage: int) -> None:
        try:
            schedule = schedules[replica]
            actions = () if schedule is None else schedule.actions[stage]
            plan = TrainPlan(0, 0, tuple(microbatches[replica]), actions, max(1, total))
            reports[replica, stage] = replicas[replica].stages[stage].compute(plan, *(blocks if stage == 0 else ()))
        except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
            reports[replica, stage] = error

    places = [(replica, stage) for replica, pipeline in enumerate(replicas) for stage in range(pipeline.num_stages)]
    threads = [threading.Thread(target=run, args=place) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    done: list[StageReport] = []
    for place in places:
        assert place in reports, f"replica and stage {place} did not come back in {TIMEOUT_S:g} s"
        report = reports[place]
        if isinstance(report, BaseException):
            raise report
        done.append(report)
    return done


def step_on(
    replicas: Sequence[Pipeline],
    schedules: Sequence[Schedule | None],
    microbatches: Sequence[Sequence[TrainMicrobatch]],
    *blocks: Any,
    learning_rate: float,
    clip_norm: float | None,
) -> tuple[float, float]:
    """Both phases, as `Trainer` does them; the mean loss and the norm before clipping."""
    reports = compute_on(replicas, schedules, microbatches, *blocks)
    # Twins report the same gradients: the first replica's count.
    norms = {name: norm for report in reports[: replicas[0].num_stages] for name, norm in report.squared_norms.items()}
    norm = global_norm(norms)
    for pipeline in replicas:
        for stage in pipeline.stages:
            stage.commit(clip_scale(norm, clip_norm), learning_rate)
    total = sum(microbatch.num_targets for own in microbatches for microbatch in own)
    return sum(loss for report in reports for loss in report.losses) / max(1, total), norm
