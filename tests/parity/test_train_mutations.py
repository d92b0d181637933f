"""Ladder G, for training: each mutation must turn the comparison with Hugging Face's loop red, or it proves nothing.

The check is ladder D in small: loss, norm and weights over a few steps of AdamW. (What a resume may get wrong is in
`test_train_resume`, what inference may in `test_mutations`.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from ray_ministral.model.checkpoint import EMBEDDING, OUTPUT_LAYER
from ray_ministral.pipeline.schedule import Action, Kind
from ray_ministral.training import targets
from ray_ministral.training.optimizer import Optimizer
from ray_ministral.training.plan import TrainMicrobatch, TrainPlan
from ray_ministral.training.rates import LearningRate, clip_scale, global_norm
from ray_ministral.training.stage import TrainStage
from tests.parity.small_models import make_row
from tests.parity.test_mutations import Mutation, assert_turns_red, detached_images, mutated
from tests.parity.test_train_curve import OPTIMIZER, assert_curves_agree, assert_weights_agree
from tests.parity.test_train_data import test_the_loss_is_hugging_faces as check_from_parquet_to_loss
from tests.parity.train_harness import QueueTransport, ThreadTwins
from tests.parity.train_reference import HuggingFaceLoop
from tests.parity.train_runs import CLIP_NORM, INTERLEAVED, TWO, Batch, Layout, batch_of, run, run_replicas

STEPS = 3
RATE = LearningRate(1e-3, warmup_steps=2, total_steps=4, schedule="linear")
ZERO_BUBBLE = Layout((2, 2), 2, "zero-bubble")


@lru_cache
def make_batch(step: int, microbatches: int) -> Batch:
    """Microbatches of one length, so that no shape tells them apart, and with unequal numbers of targets."""
    generator = np.random.default_rng(50 + step)
    rows = [[make_row(generator, 9, [(2, 2)]), make_row(generator, 6)] for _ in range(microbatches)]
    batch = batch_of(rows, generator)
    assert len({microbatch.num_tokens for microbatch in batch.microbatches}) == 1
    assert len({microbatch.num_targets for microbatch in batch.microbatches}) > 1
    return batch


@pytest.fixture(scope="module")
def curve_agrees(reference: Any, directory: Any) -> Callable[..., None]:
    """D in small, of a tied model: `curve_agrees(layout, replicas=1)`."""
    start = HuggingFaceLoop(reference(tied=True)).weights()
    theirs = HuggingFaceLoop(reference(tied=True), optimizer=OPTIMIZER, rate=RATE, clip_norm=CLIP_NORM)
    expected = [theirs.step(make_batch(step, 4)) for step in range(STEPS)]
    weights = theirs.weights()
    assert min(norm for _, norm in expected) > 2 * CLIP_NORM

    def check(layout: Layout, replicas: int = 1) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.parity.train_runs.make_batch", make_batch)
            if replicas == 1:
                pipeline = layout.pipeline(directory(tied=True), optimizer=OPTIMIZER)
                curve = run(pipeline, layout, range(STEPS), rate=RATE)
            else:
                pipeline, *others = layout.replicas(replicas, directory(tied=True), optimizer=OPTIMIZER)
                curve = run_replicas([pipeline, *others], layout, range(STEPS), rate=RATE)
        assert_curves_agree(curve, expected)
        assert_weights_agree(pipeline.weights(), weights, start)

    return check


def before(patch: pytest.MonkeyPatch, method: str, change: Callable[..., None]) -> None:
    """`change(stage, *arguments)` runs before each call of a method of `TrainStage`."""
    original = getattr(TrainStage, method)

    def changed(self: TrainStage, *arguments: Any) -> Any:
        change(self, *arguments)
        return original(self, *arguments)

    patch.setattr(TrainStage, method, changed)


# The loss


def divide_by_the_microbatchs_targets(patch: pytest.MonkeyPatch) -> None:
    run_chunk = TrainStage._run_chunk

    def broken(self: TrainStage, key: Any, hidden: Any, batch: Any, microbatch: TrainMicrobatch, plan: Any) -> Tensor:
        own = dataclasses.replace(plan, total_targets=4 * microbatch.num_targets)
        return run_chunk(self, key, hidden, batch, microbatch, own)

    patch.setattr(TrainStage, "_run_chunk", broken)


def targets_one_place_on(patch: pytest.MonkeyPatch) -> None:
    forward = TrainStage._forward

    def broken(self: TrainStage, key: Any, microbatch: TrainMicrobatch, plan: Any, blocks: Any) -> None:
        forward(self, key, dataclasses.replace(microbatch, targets=np.roll(microbatch.targets, 1)), plan, blocks)

    patch.setattr(TrainStage, "_forward", broken)


# Gradients on their way


def forget_what_was_accumulated(patch: pytest.MonkeyPatch) -> None:
    before(patch, "_backward", lambda self, *_: self.discard())


def add_up_what_was_left_of_the_last_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TrainStage, "discard", lambda self: None)


def send_zeros(patch: pytest.MonkeyPatch) -> None:
    def change(self: TrainStage, action: Action, *_: Any) -> None:
        if action.kind is Kind.SEND_B:
            self._received[Kind.SEND_B, action.microbatch, action.chunk].zero_()

    before(patch, "_run", change)


def swap_two_microbatches_gradients(patch: pytest.MonkeyPatch) -> None:
    """A gradient is taken for that of its neighbour: 0 for 1, 2 for 3."""
    receive = QueueTransport.receive

    def broken(self: QueueTransport, shape: Any, dtype: Any, from_stage: int, tag: int) -> Tensor:
        chunks, is_gradient = 2, tag % 2 == 1 and tag < 1000
        index, chunk = divmod(tag // 2, chunks)
        other = ((index ^ 1) * chunks + chunk) * 2 + 1
        return receive(self, shape, dtype, from_stage, other if is_gradient else tag)

    patch.setattr(QueueTransport, "receive", broken)


def skip_the_weight_part(patch: pytest.MonkeyPatch) -> None:
    def change(self: TrainStage, action: Action, *_: Any) -> None:
        if action.kind is Kind.W and action.microbatch == 1:
            self._weight_parts[action.microbatch, action.chunk] = []

    before(patch, "_run", change)


def run_a_weight_part_twice(patch: pytest.MonkeyPatch) -> None:
    def change(self: TrainStage, action: Action, *_: Any) -> None:
        if action.kind is Kind.W and action.microbatch == 1:
            self._weight_parts[action.microbatch, action.chunk][0]()

    before(patch, "_run", change)


# Tied embeddings


def zero_gradient_of(name: str) -> Mutation:
    def mutation(patch: pytest.MonkeyPatch) -> None:
        def change(self: TrainStage) -> None:
            if name in self._parameters:
                self._parameters[name].main_grad.zero_()  # type: ignore[attr-defined]

        before(patch, "_share_tied_gradient", change)

    mutation.__name__ = f"drop_the_gradient_of_{name.rpartition('.')[0].rpartition('.')[2]}"
    return mutation


def the_sum_stays_on_the_first_stage(patch: pytest.MonkeyPatch) -> None:
    """The output layer is updated by its own gradient, so the two ends drift apart."""
    share = TrainStage._share_tied_gradient

    def broken(self: TrainStage) -> None:
        output = self._parameters.get(OUTPUT_LAYER)
        own = None if output is None else output.main_grad.clone()  # type: ignore[attr-defined]
        share(self)
        if output is not None:
            output.main_grad.copy_(own)  # type: ignore[attr-defined]

    patch.setattr(TrainStage, "_share_tied_gradient", broken)


def count_the_tied_gradient_twice(patch: pytest.MonkeyPatch) -> None:
    norms = TrainStage._squared_norms

    def broken(self: TrainStage) -> dict[str, float]:
        self._tied = False
        try:
            return norms(self)
        finally:
            self._tied = True

    patch.setattr(TrainStage, "_squared_norms", broken)


# The step


def clip_each_stage_by_its_own_norm(patch: pytest.MonkeyPatch) -> None:
    commit = TrainStage.commit

    def broken(self: TrainStage, scale: float, learning_rate: float) -> None:
        commit(self, clip_scale(global_norm(self._squared_norms()), CLIP_NORM), learning_rate)

    patch.setattr(TrainStage, "commit", broken)


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    commit = TrainStage.commit
    patch.setattr(TrainStage, "commit", lambda self, scale, learning_rate: commit(self, 1.0, learning_rate))


def all_groups(name: str, **options: Any) -> Mutation:
    """Other options of the optimizer for all parameters."""

    def mutation(patch: pytest.MonkeyPatch) -> None:
        init = Optimizer.__init__

        def broken(self: Optimizer, *arguments: Any) -> None:
            init(self, *arguments)
            for group in self._optimizers[0].param_groups:
                group.update(options)

        patch.setattr(Optimizer, "__init__", broken)

    mutation.__name__ = name
    return mutation


decay_norms_too = all_groups("decay_norms_too", weight_decay=OPTIMIZER.weight_decay)
decay_nothing = all_groups("decay_nothing", weight_decay=0.0)
other_betas = all_groups("other_betas", betas=(0.9, 0.999))


def shift_the_rate(steps: int) -> Mutation:
    def mutation(patch: pytest.MonkeyPatch) -> None:
        at = LearningRate.at
        patch.setattr(LearningRate, "at", lambda self, step: at(self, max(0, step + steps)))

    mutation.__name__ = f"shift_the_rate_by_{steps}"
    return mutation


# Replicas


def each_replica_for_itself(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ThreadTwins, "add_up", lambda self, tensor: None)


def forget_the_last_replica(patch: pytest.MonkeyPatch) -> None:
    add_up = ThreadTwins.add_up

    def broken(self: ThreadTwins, tensor: Tensor) -> None:
        if self._replica > 0:
            tensor.zero_()
        add_up(self, tensor)

    patch.setattr(ThreadTwins, "add_up", broken)


def average_over_replicas(patch: pytest.MonkeyPatch) -> None:
    """The loss is divided by the targets of all replicas already."""
    add_up = ThreadTwins.add_up

    def broken(self: ThreadTwins, tensor: Tensor) -> None:
        add_up(self, tensor)
        tensor.div_(len(self._meeting.tensors))

    patch.setattr(ThreadTwins, "add_up", broken)


def divide_by_the_replicas_targets(patch: pytest.MonkeyPatch) -> None:
    compute = TrainStage.compute

    def broken(self: TrainStage, plan: TrainPlan, *blocks: Any) -> Any:
        own = sum(microbatch.num_targets for microbatch in plan.microbatches)
        return compute(self, dataclasses.replace(plan, total_targets=2 * own), *blocks)

    patch.setattr(TrainStage, "compute", broken)


@pytest.mark.parametrize(
    ("layout", "replicas"),
    [(TWO, 1), (INTERLEAVED, 1), (ZERO_BUBBLE, 1), (TWO, 2)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_unbroken_code_passes(layout: Layout, replicas: int, curve_agrees: Callable[..., None]) -> None:
    """The other half of each test below."""
    curve_agrees(layout, replicas)


@pytest.mark.parametrize(
    ("layout", "mutation"),
    [
        *((layout, divide_by_the_microbatchs_targets) for layout in (TWO, INTERLEAVED)),
        (TWO, targets_one_place_on),
        (TWO, detached_images),
        (TWO, forget_what_was_accumulated),
        (TWO, add_up_what_was_left_of_the_last_step),
        *((layout, send_zeros) for layout in (TWO, INTERLEAVED, ZERO_BUBBLE)),
        *((layout, swap_two_microbatches_gradients) for layout in (TWO, ZERO_BUBBLE)),
        (ZERO_BUBBLE, skip_the_weight_part),
        (ZERO_BUBBLE, run_a_weight_part_twice),
        *((layout, zero_gradient_of(name)) for layout in (TWO, INTERLEAVED) for name in (EMBEDDING, OUTPUT_LAYER)),
        (TWO, the_sum_stays_on_the_first_stage),
        (TWO, count_the_tied_gradient_twice),
        (TWO, clip_each_stage_by_its_own_norm),
        (TWO, no_clipping),
        (TWO, decay_norms_too),
        (TWO, decay_nothing),
        (TWO, other_betas),
        (TWO, shift_the_rate(1)),
        (TWO, shift_the_rate(-1)),
    ],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)
def test_the_curve_notices(layout: Layout, mutation: Mutation, curve_agrees: Callable[..., None]) -> None:
    with mutated(mutation), pytest.raises(AssertionError):
        curve_agrees(layout)


@pytest.mark.parametrize(
    "mutation",
    [each_replica_for_itself, forget_the_last_replica, average_over_replicas, divide_by_the_replicas_targets],
)
def test_replicas_notice(mutation: Mutation, curve_agrees: Callable[..., None]) -> None:
    with mutated(mutation), pytest.raises(AssertionError):
        curve_agrees(TWO, replicas=2)


def test_the_loss_of_a_file_notices_targets_that_are_not_shifted(tmp_path: Path) -> None:
    """Each token asked to predict itself: from parquet on, where targets are made."""

    def not_shifted(patch: pytest.MonkeyPatch) -> None:
        def broken(token_ids: np.ndarray, learnt: np.ndarray, sizes: Any, prompt: int) -> targets.TrainSample:
            wrong = np.where(learnt, token_ids, targets.IGNORED).astype(np.int32)
            return targets.TrainSample(token_ids, wrong, sizes, prompt)

        patch.setattr(targets, "_shifted", broken)

    assert_turns_red(lambda: check_from_parquet_to_loss(tmp_path, 1), not_shifted)
