"""Training in bf16: losses and gradients are no further from Hugging Face's fp32 than Hugging Face's own bf16 is.

Rounding is a matter of chance, so what is compared is the root of the mean square over several steps: for the whole
gradient and for each part of the model without any allowance; for a single parameter, of which one in sixty may come
out on the wrong side by its own luck, within a twentieth. Losses are eight numbers for each, whose spread is known to a
quarter at best: they get a factor of 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Mistral3ForConditionalGeneration

from tests.parity.small_models import quiet_transformers
from tests.parity.test_train_gradients import compute
from tests.parity.train_reference import HuggingFaceLoop
from tests.parity.train_runs import TWO, make_batch

STEPS = 8
PARTS = ("vision_tower", "multi_modal_projector", "language_model")


def squares(gradients: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """The squared distance of each gradient from the truth."""
    assert gradients.keys() == truth.keys()
    return {name: float((gradients[name].float() - truth[name]).norm()) ** 2 for name in truth}


def root(values: Iterable[float]) -> float:
    return math.sqrt(sum(values))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_bfloat16_is_as_near_to_the_truth_as_hugging_face(tied: bool, directory: Any, reference: Any) -> None:
    with quiet_transformers():
        rounded = Mistral3ForConditionalGeneration.from_pretrained(directory(tied=tied), dtype=torch.bfloat16).eval()
    truth, theirs = HuggingFaceLoop(reference(tied=tied)), HuggingFaceLoop(rounded)
    pipeline = TWO.pipeline(directory(tied=tied), dtype=torch.bfloat16)
    off: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    loss_off: dict[str, list[float]] = {"ours": [], "theirs": []}
    for step in range(STEPS):
        batch = make_batch(step)
        true_loss, true_gradients = truth.gradients(batch)
        our_loss, our_gradients, _ = compute(pipeline, TWO, batch)
        their_loss, their_gradients = theirs.gradients(batch)
        assert next(iter(their_gradients.values())).dtype == torch.bfloat16
        for who, loss, gradients in (("ours", our_loss, our_gradients), ("theirs", their_loss, their_gradients)):
            off[who].append(squares(gradients, true_gradients))
            loss_off[who].append((loss - true_loss) ** 2)

    def distance(who: str, part: str) -> float:
        """Over all steps, of all parameters with `part` in their name."""
        return root(square for step in off[who] for name, square in step.items() if part in name)

    assert distance("ours", "") > 0, "bf16 is in use"
    for part in ("", *PARTS):
        assert distance("ours", part) <= distance("theirs", part), part or "the whole gradient"
    for name in truth.parameters:
        assert distance("ours", name) <= 1.05 * distance("theirs", name), name
    assert root(loss_off["ours"]) <= 1.5 * root(loss_off["theirs"])


def test_masters_keep_what_bfloat16_cannot(directory: Any) -> None:
    """Steps too small for a bf16 weight to move add up in its fp32 master, and then it moves."""
    pipeline = TWO.pipeline(directory(), dtype=torch.bfloat16)
    name = "model.language_model.norm.weight"  # about 1, where bf16 has steps of 1/128
    optimizer = pipeline.stages[1].optimizer
    batch, schedule = make_batch(0), TWO.make_schedule(pipeline)
    before, master = pipeline.weights()[name], optimizer.masters[name].detach().clone()

    def train(steps: int) -> Tensor:
        for _ in range(steps):
            pipeline.step(schedule, batch.microbatches, *batch.blocks, learning_rate=1e-4, clip_norm=1.0)
        return pipeline.weights()[name]

    after = train(1)
    assert (optimizer.masters[name] != master).all(), "every master has moved"
    assert (after == before).float().mean() > 0.9, "hardly a weight has"
    assert (train(59) != before).float().mean() > 0.5
