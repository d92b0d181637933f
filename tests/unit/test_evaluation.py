"""The evaluation loss without a cluster: which rows, in which batches, on which replica, and what their mean is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ray_ministral.config import EvalConfig, SampleConfig, TrainConfig
from ray_ministral.data.row_reader import RowIndex
from ray_ministral.data.rows import RowFailure
from ray_ministral.driver.evaluation import Evaluator
from ray_ministral.errors import InputError
from ray_ministral.pipeline.schedule import Kind
from ray_ministral.training.plan import IGNORED, TrainPlan
from ray_ministral.training.samples import PreparedSamples, SkippedRow
from ray_ministral.training.targets import TrainSample

BAD = {3, 4, 5, 9}


def sample(number: int) -> TrainSample:
    """`number` + 2 tokens, of which all but the first two are learnt."""
    ids = np.full(number + 2, number, dtype=np.int32)
    targets = ids.copy()
    targets[:2] = IGNORED
    return TrainSample(ids, targets, (), prompt_tokens=3)


def prepared(numbers: Sequence[int]) -> PreparedSamples:
    failure = RowFailure("bad_image", "no image", "decode")
    skipped = tuple(SkippedRow("a.parquet", 0, number, failure) for number in numbers if number in BAD)
    return PreparedSamples(tuple(None if number in BAD else sample(number) for number in numbers), skipped, 0)


@dataclass
class Stage:
    """Takes what an actor would; the last one answers with ten times the targets of each microbatch."""

    last: bool
    plans: list[TrainPlan] = field(default_factory=list)

    @property
    def evaluate(self) -> Any:
        return SimpleNamespace(remote=self._evaluate)

    def _evaluate(self, plan: TrainPlan, *blocks: Any) -> tuple[float, ...]:
        self.plans.append(plan)
        assert {action.kind for action in plan.actions} <= {Kind.F, Kind.SEND_F, Kind.RECV_F}
        return tuple(10.0 * microbatch.num_targets for microbatch in plan.microbatches) if self.last else ()


class Rows(RowIndex):
    """Rows whose place is their number."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def place(self, number: int) -> Any:
        return number


def evaluator(
    rows: int, replicas: int, limit: int | None = None
) -> tuple[Evaluator, list[list[Stage]], list[list[int]]]:
    """It, the stages that it calls, and the batches that it asks for."""
    asked: list[list[int]] = []

    def prepare(places: Sequence[Any]) -> tuple[Any, None]:
        asked.append(list(places))
        return prepared(places), None

    config = TrainConfig(
        model="m",
        train=("t",),
        output="o",
        samples=SampleConfig(response_column="r"),
        eval=EvalConfig("e", limit=limit),
        global_batch_size=3,
        microbatch_size=2,
        steps=1,
    )
    stages = [[Stage(False), Stage(True)] for _ in range(replicas)]
    pipelines: Any = [SimpleNamespace(actors=own, num_stages=2, generation=0) for own in stages]
    job: Any = SimpleNamespace(config=config)
    return Evaluator(job, Rows(rows), pipelines, prepare, lambda references: references), stages, asked


@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_the_mean_over_all_targets_whatever_the_replicas(replicas: int) -> None:
    made, stages, asked = evaluator(11, replicas)
    result, skipped = made.loss(7)
    assert asked == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    whole = [number for number in range(11) if number not in BAD]
    assert (result.step, result.loss, result.tokens) == (7, 10.0, sum(whole))
    assert (result.rows, result.skipped) == (7, 4)
    assert [row.row for row in skipped] == sorted(BAD)
    # A batch with no whole row asks nothing of the stages; the others go to the replicas in turn.
    sizes = [[sum(len(m.lengths) for m in plan.microbatches) for plan in own[0].plans] for own in stages]
    assert sizes == {1: [[3, 3, 1]], 2: [[3, 3], [1]], 5: [[3], [], [3], [1], []]}[replicas]
    assert all(plan.total_targets > 0 for own in stages for stage in own for plan in stage.plans)


def test_the_first_rows_only() -> None:
    made, _, asked = evaluator(11, 1, limit=4)
    result, _ = made.loss(0)
    assert asked == [[0, 1, 2], [3]]
    assert (result.rows, result.skipped) == (3, 1)


def test_no_row_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "BAD", set(range(4)))
    made, _, _ = evaluator(4, 1)
    with pytest.raises(InputError, match=r"--eval e has no row that can be used; the first, row 0 .*: no image"):
        made.loss(0)
