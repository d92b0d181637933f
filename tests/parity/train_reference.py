"""A plain Hugging Face training loop, as users write it: one padded batch, the model's own loss, torch's AdamW.

The yardstick of training, so nothing here uses this package's model, loss, clipping, optimizer or learning rates.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from transformers import Mistral3ForConditionalGeneration

from ray_ministral.config import OptimizerConfig
from ray_ministral.training.rates import LearningRate
from tests.parity.small_models import pad_rows
from tests.parity.train_runs import Batch

PARTS = ("vision", "projector", "language")


def freeze(model: Mistral3ForConditionalGeneration, parts: Collection[str]) -> None:
    """Stop the gradients of some of `PARTS`."""
    modules = {
        "vision": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "language": [model.model.language_model, model.lm_head],
    }
    for part in parts:
        for module in modules[part]:
            module.requires_grad_(False)


def mean_loss(model: Mistral3ForConditionalGeneration, batch: Batch) -> Tensor:
    """The mean over all tokens of the step that count: what the model itself says of one padded batch with labels."""
    rows = [row for own in batch.rows for row in own]
    padded = pad_rows(rows)
    labels = torch.full_like(padded.input_ids, -100)
    number = 0
    for microbatch in batch.microbatches:
        start = 0
        for length in microbatch.lengths:
            # The model shifts labels: what token t should predict stands at t + 1.
            targets = torch.from_numpy(microbatch.targets[start : start + length].astype("int64"))
            labels[number, 1:length] = targets[:-1]
            number, start = number + 1, start + length
    assert number == len(rows)
    loss: Tensor = model(**padded.arguments, labels=labels).loss
    return loss


class HuggingFaceLoop:
    """A copy of a model, AdamW without decay on norms and biases, clipping, and torch's own learning-rate schedules."""

    def __init__(
        self,
        model: Mistral3ForConditionalGeneration,
        *,
        optimizer: OptimizerConfig | None = None,
        rate: LearningRate | None = None,
        clip_norm: float | None = None,
        frozen: Collection[str] = (),
    ) -> None:
        self.model = copy.deepcopy(model)
        freeze(self.model, frozen)
        self.clip_norm = clip_norm
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        options = optimizer or OptimizerConfig()
        plain = {name for name in self.parameters if "norm" in name or "ln_pre" in name or name.endswith(".bias")}
        self._adamw = torch.optim.AdamW(
            [
                {"params": [p for n, p in self.parameters.items() if n not in plain]},
                {"params": [p for n, p in self.parameters.items() if n in plain], "weight_decay": 0.0},
            ],
            lr=rate.peak if rate is not None else 1e-3,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
            weight_decay=options.weight_decay,
        )
        self._scheduler = None if rate is None else _scheduler(self._adamw, rate)

    def gradients(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """Loss, and the gradient of each trainable parameter by name (zeros where the loss does not depend on it)."""
        self.model.zero_grad()
        loss = mean_loss(self.model, batch)
        if loss.requires_grad:
            loss.backward()
        return loss.item(), {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in self.parameters.items()
        }

    def step(self, batch: Batch) -> tuple[float, float]:
        """One optimizer step; loss and norm before clipping."""
        loss = mean_loss(self.model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), float("inf") if self.clip_norm is None else self.clip_norm
        )
        self._adamw.step()
        self._adamw.zero_grad()
        if self._scheduler is not None:
            self._scheduler.step()
        return loss.item(), norm.item()

    def weights(self) -> dict[str, Tensor]:
        """By name; a tied output layer once, as the embedding."""
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def _scheduler(adamw: torch.optim.Optimizer, rate: LearningRate) -> LRScheduler:
    """The first step has a share of the peak already, the last one of the warmup all of it."""
    left = (rate.total_steps or 0) - rate.warmup_steps
    after: dict[str, Any] = {
        "constant": lambda: ConstantLR(adamw, 1.0),
        "cosine": lambda: CosineAnnealingLR(adamw, left),
        "linear": lambda: LinearLR(adamw, 1.0, 0.0, left),
    }
    if rate.warmup_steps < 2:
        made: LRScheduler = after[rate.schedule]()
        return made
    warmup = LinearLR(adamw, 1 / rate.warmup_steps, 1.0, rate.warmup_steps - 1)
    return SequentialLR(adamw, [warmup, after[rate.schedule]()], [rate.warmup_steps])
