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
from ray_ministral.model.weights import all_slots
from ray_ministral.pipeline.pixels import PixelTable
from ray_ministral.pipeline.schedule import Action, Kind
from ray_ministral.pipeline.simulator import Span
from ray_ministral.pipeline.stage import process_memory
from ray_ministral.pipeline.transport import Transport, Twins
from ray_ministral.training.mailbox import TIED_TAG, Mailbox
from ray_ministral.training.optimizer import Optimizer
from ray_ministral.training.plan import IGNORED, StageReport, TrainMicrobatch, TrainPlan

Pixels = list[list[np.ndarray]]


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
        self.optimizer = Optimizer(list(self.chunks.values()), optimizer)
        self._parameters = self.optimizer.parameters
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
        self._mail: Mailbox | None = None
        self._received: dict[tuple[Kind, int, int], Tensor] = {}
        self._inputs: dict[tuple[int, int], Tensor | None] = {}
        self._leaving: dict[tuple[int, int], Tensor] = {}
        self._roots: dict[tuple[int, int], Tensor] = {}
        self._batches: dict[tuple[int, int], PackedBatch] = {}
        self._weight_parts: dict[tuple[int, int], list[WeightPart]] = {}
        self._losses: dict[int, Tensor] = {}

    def compute(self, plan: TrainPlan, *blocks: Pixels) -> StageReport:
        """Phase one: run the actions; gradients of the whole step are left in `main_grad`."""
        started, begun = time.time(), time.perf_counter()
        self.discard()
        losses, spans = self._run_all(plan, blocks)
        for accumulator in self._accumulators.values():
            accumulator.finish()
        if self._twins is not None:
            for parameter in self._parameters.values():
                self._twins.add_up(parameter.main_grad)  # type: ignore[attr-defined]
        self._share_tied_gradient()
        norms = self._squared_norms()
        peak = process_memory()["peak_rss"]
        return StageReport(losses, norms, started, time.perf_counter() - begun, spans, peak)

    def evaluate(self, plan: TrainPlan, *blocks: Pixels) -> tuple[float, ...]:
        """Run actions that are forward alone: `StageReport.losses`. Weights, gradients and moments stay as they are."""
        assert not any(action.kind in (Kind.B, Kind.W) for action in plan.actions), "an evaluation has no backward pass"
        return self._run_all(plan, blocks)[0]

    def commit(self, scale: float, learning_rate: float) -> None:
        """Phase two: scale all gradients (clipping), step the optimizer, forget the gradients."""
        self.optimizer.step(scale, learning_rate)
        self.discard()

    def forget(self) -> None:
        """Forget what a step that has failed has left: activations, and messages under way."""
        self._reset()

    def discard(self) -> None:
        """Forget the gradients: the step has not happened."""
        for accumulator in self._accumulators.values():
            accumulator.reset()

    # The interpreter

    def _run_all(self, plan: TrainPlan, blocks: tuple[Pixels, ...]) -> tuple[tuple[float, ...], tuple[Span, ...]]:
        """All actions of a plan, in order: the microbatches' losses, and when each action ran."""
        begun = time.perf_counter()
        self._reset()
        self._wanted = frozenset((action.kind, action.chunk) for action in plan.actions)
        if self._channel is not None:
            hidden: Any = next(iter(self.chunks.values())).config.hidden_size
            self._mail = Mailbox(
                self._channel,
                plan,
                num_stages=self._num_stages,
                num_chunks=self.num_chunks,
                hidden=hidden,
                dtype=self._dtype,
            )
        spans = []
        for action in plan.actions:
            start = time.perf_counter() - begun
            self._run(action, plan, blocks)
            spans.append(Span(action, start, time.perf_counter() - begun))
        if self._mail is not None:
            self._mail.flush()
        losses = tuple(float(self._losses[index]) for index in sorted(self._losses))
        self._reset()
        return losses, tuple(spans)

    def _run(self, action: Action, plan: TrainPlan, blocks: tuple[Pixels, ...]) -> None:
        key = (action.microbatch, action.chunk)
        match action.kind:
            case Kind.F:
                self._forward(key, plan.microbatches[action.microbatch], plan, blocks)
            case Kind.B:
                self._backward(key, plan)
            case Kind.W:
                for weight_part in self._weight_parts.pop(key):
                    weight_part()
            case Kind.SEND_F:
                self._mailbox.send(action, self._leaving.pop(key))
            case Kind.RECV_F:
                self._received[Kind.F, *key] = self._mailbox.receive(action)
            case Kind.SEND_B:
                self._mailbox.send(action, self._received.pop((Kind.SEND_B, *key)))
            case Kind.RECV_B:
                self._received[Kind.B, *key] = self._mailbox.receive(action)

    @property
    def _mailbox(self) -> Mailbox:
        assert self._mail is not None, "connect() before a step on several stages"
        return self._mail

    def _forward(
        self, key: tuple[int, int], microbatch: TrainMicrobatch, plan: TrainPlan, blocks: tuple[Pixels, ...]
    ) -> None:
        index, chunk = key
        hidden = self._received.pop((Kind.F, index, chunk), None)
        if hidden is None and chunk > 0:
            hidden = self._leaving.pop((index, chunk - 1))  # the chunk before is on this stage, too
        if hidden is not None and self._gradient_goes_to(chunk - 1):
            hidden.requires_grad_()
        batch = self._batch(self.chunks[chunk], microbatch, blocks)
        with torch.set_grad_enabled((Kind.B, chunk) in self._wanted and not self._recompute):
            output = self._run_chunk(key, hidden, batch, microbatch, plan)
        if chunk < self._last_chunk:
            self._leaving[key] = output.detach()
        if (Kind.B, chunk) in self._wanted:
            self._inputs[key] = hidden
            if self._recompute:
                self._batches[key] = batch
            else:
                self._roots[key] = output

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
        hidden = self._inputs.pop(key)
        if self._recompute:
            output = self._run_chunk(key, hidden, self._batches.pop(key), plan.microbatches[index], plan)
        else:
            output = self._roots.pop(key)
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

    def _stage_of(self, chunk: int) -> int:
        return chunk % self._num_stages

    # Gradients

    def _share_tied_gradient(self) -> None:
        """Embedding and output layer of a tied model are updated alike: by the embedding's gradient plus the other.

        Wherever they are, the sum is made in this order; on two stages both make it.
        """
        embedding = self._parameters.get(EMBEDDING)
        output_layer = self._parameters.get(OUTPUT_LAYER)
        if not self._tied or (embedding is None and output_layer is None):
            return
        first: Any = None if embedding is None else embedding.main_grad  # type: ignore[attr-defined]
        last: Any = None if output_layer is None else output_layer.main_grad  # type: ignore[attr-defined]
        if first is not None and last is not None:
            first.add_(last)
            last.copy_(first)
        elif first is not None:
            first.add_(self._exchange(first, self._stage_of(self._last_chunk)))
        else:
            torch.add(self._exchange(last, 0), last, out=last)

    def _exchange(self, mine: Tensor, peer: int) -> Tensor:
        """Give a tensor to another stage for one of the same shape."""
        wait = self._transport.receive(tuple(mine.shape), mine.dtype, peer, TIED_TAG)
        self._transport.send(mine, peer, TIED_TAG)
        theirs = wait()
        self._transport.flush()
        return theirs

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
