"""`TrainStage`: the chunks of one stage in training, and the interpreter of a schedule's actions. Plain class, no Ray.

A step has two phases. `compute` runs all actions and leaves gradients, nothing else; `commit` clips and steps the
optimizer. Until `commit` the step is void at no cost: `discard`. Legend as in `model.packed`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ray_ministral.config import OptimizerConfig
from ray_ministral.model.architecture import is_tied
from ray_ministral.model.checkpoint import EMBEDDING, OUTPUT_LAYER
from ray_ministral.model.gradients import GradientAccumulator, WeightPart
from ray_ministral.model.ministral3 import Ministral3Model
from ray_ministral.model.packed import PackedBatch
from ray_ministral.model.weights import all_slots, parameter_names
from ray_ministral.pipeline.pixels import PixelTable
from ray_ministral.pipeline.schedule import Action, Kind
from ray_ministral.pipeline.transport import Transport, Twins
from ray_ministral.training.optimizer import AdamW
from ray_ministral.training.plan import IGNORED, StageReport, TrainMicrobatch, TrainPlan

Pixels = list[list[np.ndarray]]

TIED_TAG = 1 << 30
"""Tag of the messages about a tied embedding; those of activations count from 0."""


class TrainStage:
    """One stage: its chunks by global chunk number, its optimizer, its way to the neighbours."""

    def __init__(
        self,
        chunks: Mapping[int, Ministral3Model],
        *,
        stage: int,
        num_stages: int,
        num_chunks: int,
        transport: Transport | None = None,
        twins: Twins | None = None,
        optimizer: OptimizerConfig,
        pixel_table: np.ndarray | None = None,
        recompute: bool = False,
    ) -> None:
        self.chunks = dict(chunks)
        self._stage, self._num_stages, self._last_chunk = stage, num_stages, num_chunks - 1
        self.connect(transport, twins)
        self._recompute = recompute
        first = next(iter(self.chunks.values()))
        self._dtype: torch.dtype = first.config.params_dtype
        self._device = next(first.parameters()).device
        self._tied = is_tied(first.hf_config)
        self._accumulators = {number: GradientAccumulator(chunk) for number, chunk in self.chunks.items()}
        self._parameters = {
            name: parameter
            for chunk in self.chunks.values()
            for name, parameter in parameter_names(chunk).items()
            if parameter.requires_grad
        }
        self.optimizer = AdamW(self._parameters, optimizer)
        self._pixels = None if pixel_table is None else PixelTable(pixel_table, self._dtype, self._device)
        self._reset()

    def connect(self, transport: Transport | None, twins: Twins | None = None) -> None:
        """The way to the other stages, and to the same stage of other replicas, of a new generation."""
        self._channel = transport
        self._twins = twins
        self.store: Any = None

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole pipeline."""
        return self._last_chunk + 1

    @property
    def _transport(self) -> Transport:
        assert self._channel is not None, "connect() before a step on several stages"
        return self._channel

    def _reset(self) -> None:
        self._received: dict[tuple[Kind, int, int], Tensor] = {}
        self._inputs: dict[tuple[int, int], Tensor | None] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._batches: dict[tuple[int, int], PackedBatch] = {}
        self._weight_parts: dict[tuple[int, int], list[WeightPart]] = {}
        self._losses: dict[int, Tensor] = {}

    def compute(self, plan: TrainPlan, *blocks: Pixels) -> StageReport:
        """Phase one: run the actions; gradients of the whole step are left in `main_grad`."""
        started = time.perf_counter()
        self._waited = 0.0
        self._reset()
        self.discard()
        self._wanted = frozenset((action.kind, action.chunk) for action in plan.actions)
        for action in plan.actions:
            self._run(action, plan, blocks)
        if self._channel is not None:
            self._channel.flush()
        for accumulator in self._accumulators.values():
            accumulator.finish()
        if self._twins is not None:
            for parameter in self._parameters.values():
                self._twins.add_up(parameter.main_grad)  # type: ignore[attr-defined]
        self._share_tied_gradient()
        losses = tuple(float(self._losses[index]) for index in sorted(self._losses))
        self._reset()
        return StageReport(losses, self._squared_norms(), time.perf_counter() - started - self._waited)

    def evaluate(self, plan: TrainPlan, *blocks: Pixels) -> tuple[float, ...]:
        """Run actions that are forward alone: `StageReport.losses`. Weights, gradients and moments stay as they are."""
        self._waited = 0.0
        self._reset()
        self._wanted = frozenset((action.kind, action.chunk) for action in plan.actions)
        assert not any(kind in (Kind.B, Kind.W) for kind, _ in self._wanted), "an evaluation has no backward pass"
        for action in plan.actions:
            self._run(action, plan, blocks)
        if self._channel is not None:
            self._channel.flush()
        losses = tuple(float(self._losses[index]) for index in sorted(self._losses))
        self._reset()
        return losses

    def commit(self, scale: float, learning_rate: float) -> None:
        """Phase two: scale all gradients (clipping), step the optimizer, forget the gradients."""
        self.optimizer.step(scale, learning_rate)
        self.discard()

    def discard(self) -> None:
        """Forget the gradients: the step has not happened."""
        for accumulator in self._accumulators.values():
            accumulator.reset()

    # The interpreter

    def _run(self, action: Action, plan: TrainPlan, blocks: tuple[Pixels, ...]) -> None:
        microbatch, chunk = plan.microbatches[action.microbatch], action.chunk
        key = (action.microbatch, chunk)
        match action.kind:
            case Kind.F:
                self._forward(key, microbatch, plan, blocks)
            case Kind.B:
                self._backward(key, plan)
            case Kind.W:
                for weight_part in self._weight_parts.pop(key):
                    weight_part()
            case Kind.SEND_F:
                self._transport.send(self._outputs[key], self._stage_of(chunk + 1), self._tag(Kind.F, key))
            case Kind.RECV_F:
                tag = self._tag(Kind.F, (action.microbatch, chunk - 1))
                self._received[Kind.F, *key] = self._receive(microbatch, self._stage_of(chunk - 1), tag)
            case Kind.SEND_B:
                gradient = self._received.pop((Kind.SEND_B, *key))
                self._transport.send(gradient, self._stage_of(chunk - 1), self._tag(Kind.B, key))
            case Kind.RECV_B:
                tag = self._tag(Kind.B, (action.microbatch, chunk + 1))
                self._received[Kind.B, *key] = self._receive(microbatch, self._stage_of(chunk + 1), tag)

    def _forward(
        self, key: tuple[int, int], microbatch: TrainMicrobatch, plan: TrainPlan, blocks: tuple[Pixels, ...]
    ) -> None:
        index, chunk = key
        hidden = self._received.pop((Kind.F, index, chunk), None)
        if hidden is None and chunk > 0:
            hidden = self._outputs[index, chunk - 1].detach()  # the chunk before is on this stage, too
        if hidden is not None and self._gradient_goes_to(chunk - 1):
            hidden.requires_grad_()
        batch = self._batch(self.chunks[chunk], microbatch, blocks)
        with torch.set_grad_enabled((Kind.B, chunk) in self._wanted and not self._recompute):
            output = self._run_chunk(key, hidden, batch, microbatch, plan)
        if (Kind.B, chunk) in self._wanted:
            self._inputs[key] = hidden
            if self._recompute:
                self._batches[key] = batch
        self._outputs[key] = output

    def _run_chunk(
        self,
        key: tuple[int, int],
        hidden: Tensor | None,
        batch: PackedBatch,
        microbatch: TrainMicrobatch,
        plan: TrainPlan,
    ) -> Tensor:
        """Hidden states `[T, 1, H]`, or on the last chunk the microbatch's share of the step's mean loss."""
        index, chunk = key
        model = self.chunks[chunk]
        if hidden is not None:
            model.set_input_tensor(hidden)
        output: Tensor = model(packed=batch)
        if chunk < self._last_chunk:
            return output
        targets = microbatch.targets[microbatch.targets != IGNORED].astype(np.int64)
        loss = cross_entropy(output.float(), torch.from_numpy(targets).to(self._device), reduction="sum")
        self._losses[index] = loss.detach()
        return loss / plan.total_targets

    def _backward(self, key: tuple[int, int], plan: TrainPlan) -> None:
        index, chunk = key
        output, hidden = self._outputs.pop(key), self._inputs.pop(key)
        if self._recompute:
            output = self._run_chunk(key, hidden, self._batches.pop(key), plan.microbatches[index], plan)
        gradient = None if chunk == self._last_chunk else self._received.pop((Kind.B, index, chunk))
        accumulator = self._accumulators[chunk]
        split = (Kind.W, chunk) in self._wanted
        accumulator.deferred = [] if split else None
        if output.requires_grad:  # not where only vision is trained and this microbatch has no image
            output.backward(gradient)
        if split:
            assert accumulator.deferred is not None
            self._weight_parts[key] = accumulator.deferred
            accumulator.deferred = None
        if hidden is not None and hidden.grad is not None:
            if self._stage_of(chunk - 1) == self._stage:
                self._received[Kind.B, index, chunk - 1] = hidden.grad
            else:
                self._received[Kind.SEND_B, index, chunk] = hidden.grad

    def _gradient_goes_to(self, chunk: int) -> bool:
        """Whether the chunk before one of ours wants the gradient of what it gave: not if all up to it is frozen."""
        return (Kind.SEND_B, chunk + 1) in self._wanted or (Kind.B, chunk) in self._wanted

    def _batch(self, model: Ministral3Model, microbatch: TrainMicrobatch, blocks: tuple[Pixels, ...]) -> PackedBatch:
        first, last = model.pre_process, model.post_process
        token_ids = torch.from_numpy(microbatch.token_ids).to(self._device, torch.int64) if first else None
        rows = np.flatnonzero(microbatch.targets != IGNORED)
        images: list[Tensor] = []
        if first and microbatch.images:
            assert self._pixels is not None, "the first stage has a pixel table"
            images = [self._pixels.normalise(p) for block, row in microbatch.images for p in blocks[block][row]]
        return PackedBatch(
            positions_T=torch.from_numpy(microbatch.positions()).to(self._device),
            lengths=microbatch.lengths,
            token_ids_T=token_ids,
            images=images,
            logit_rows=torch.from_numpy(rows).to(self._device) if last else None,
        )

    def _receive(self, microbatch: TrainMicrobatch, from_stage: int, tag: int) -> Tensor:
        started = time.perf_counter()
        hidden_size: Any = next(iter(self.chunks.values())).config.hidden_size
        shape = (microbatch.num_tokens, 1, hidden_size)
        tensor = self._transport.receive(shape, self._dtype, from_stage, tag)
        self._waited += time.perf_counter() - started
        return tensor

    def _stage_of(self, chunk: int) -> int:
        return chunk % self._num_stages

    def _tag(self, kind: Kind, key: tuple[int, int]) -> int:
        index, chunk = key
        return (index * (self._last_chunk + 1) + chunk) * 2 + (kind is Kind.B)

    # Gradients

    def _share_tied_gradient(self) -> None:
        """Embedding and output layer of a tied model are updated alike: by the embedding's gradient plus the other.

        The sum is made on the first stage, in this order, wherever the output layer is.
        """
        embedding = self._parameters.get(EMBEDDING)
        output_layer = self._parameters.get(OUTPUT_LAYER)
        if not self._tied or (embedding is None and output_layer is None):
            return
        first, last = 0, self._stage_of(self._last_chunk)
        if embedding is not None:
            mine: Tensor = embedding.main_grad  # type: ignore[attr-defined]
            if output_layer is not None:
                mine.add_(output_layer.main_grad)  # type: ignore[attr-defined]
                output_layer.main_grad.copy_(mine)  # type: ignore[attr-defined]
                return
            mine.add_(self._transport.receive(tuple(mine.shape), mine.dtype, last, TIED_TAG))
            self._transport.send(mine, last, TIED_TAG + 1)
        elif output_layer is not None:
            gradient: Tensor = output_layer.main_grad  # type: ignore[attr-defined]
            self._transport.send(gradient, first, TIED_TAG)
            received = self._transport.receive(tuple(gradient.shape), gradient.dtype, first, TIED_TAG + 1)
            self._transport.flush()
            gradient.copy_(received)
        self._transport.flush()

    def _squared_norms(self) -> dict[str, float]:
        """Of each parameter, once: the output layer of a tied model is the embedding."""
        return {
            name: float(torch.linalg.vector_norm(parameter.main_grad)) ** 2  # type: ignore[attr-defined]
            for name, parameter in self._parameters.items()
            if not (self._tied and name == OUTPUT_LAYER)
        }


def gradients(stage: TrainStage) -> dict[str, Tensor]:
    """`main_grad` of every trainable tensor by its Hugging Face name, before `commit`; for tests and inspection."""
    return {
        name: slot.read(slot.parameter.main_grad)  # type: ignore[attr-defined]
        for chunk in stage.chunks.values()
        for name, slot in all_slots(chunk).items()
        if slot.parameter.requires_grad
    }
