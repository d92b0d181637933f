"""Ladder E on real actors: stages are lost, fewer, more; curve and weights are those of a quiet run, to the bit."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ray_ministral.config import OptimizerConfig, PipelineConfig, SampleConfig, TrainConfig
from ray_ministral.driver.train_result import TrainSummary
from ray_ministral.driver.trainer import Trainer, train
from ray_ministral.errors import StageDiedError
from tests.cluster.strikes import stop_oneself
from tests.cluster.train_runs import curve, final_weights, metrics, write_pairs
from tests.cluster.train_strikes import TrainStrike, fallen, struck

STEPS = 8
pytestmark = pytest.mark.usefixtures("clean_cluster")


@pytest.fixture(scope="module")
def config(model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return TrainConfig(
        model=str(model),
        train=(str(write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet")),),
        output="to be replaced",
        samples=SampleConfig(response_column="response"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, clip_norm=0.1),
        pipeline=PipelineConfig(stages=2, threads_per_stage=1, step_timeout_s=240),
        global_batch_size=4,
        microbatch_size=2,
        steps=STEPS,
    )


@pytest.fixture(scope="module")
def quiet(config: TrainConfig, cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run."""
    output = tmp_path_factory.mktemp("quiet")
    train(replace(config, output=str(output)))
    assert all(line["grad_norm"] > 0.1 for line in metrics(output)), "clipping is active"
    return output


def assert_as_quiet(output: Path, quiet: Path) -> None:
    assert [line["step"] for line in metrics(output)] == list(range(1, STEPS + 1))
    assert curve(metrics(output)) == curve(metrics(quiet))
    ours, theirs = final_weights(output), final_weights(quiet)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def disturbed(config: TrainConfig, folder: Path, *strikes: tuple[str, int, int], **changes: Any) -> TrainSummary:
    """A run in which these strikes fall: (at, stage, step)."""
    marks = folder / "marks"
    marks.mkdir()
    strike = changes.pop("strike", None)
    kinds = [TrainStrike(marks, *own, **({} if strike is None else {"strike": strike})) for own in strikes]
    summary = train(replace(config, output=str(folder / "out"), **changes), train_actor=struck(*kinds))
    assert len(fallen(marks)) == len(strikes)
    return summary


def test_a_stage_dies_in_mid_backward_and_one_in_the_optimizer_step(
    config: TrainConfig, quiet: Path, tmp_path: Path
) -> None:
    summary = disturbed(config, tmp_path, ("backward", 1, 3), ("optimizer", 0, 5))
    assert_as_quiet(tmp_path / "out", quiet)
    assert summary.recoveries == 2
    assert 2 <= summary.steps_lost <= 3, "what was under way, and the commit that one had done and the other had not"
    lines = metrics(tmp_path / "out")
    generations = [line["generation"] for line in lines]
    assert generations == sorted(generations)
    assert generations[0] == 0
    assert generations[-1] == 2


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize(
    ("at", "stage"),
    [("forward", 0), ("forward", 1), ("backward", 0), ("optimizer", 1), ("committed", 0), ("save", 1), ("written", 0)],
)
def test_a_stage_dies_at_any_moment(at: str, stage: int, config: TrainConfig, quiet: Path, tmp_path: Path) -> None:
    summary = disturbed(config, tmp_path, (at, stage, 4), checkpoint_every=2)
    assert_as_quiet(tmp_path / "out", quiet)
    assert summary.recoveries == 1
    assert summary.steps_lost <= 2
    saved = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert saved == ["step-00000006", "step-00000008"], "no attempt is left"


@pytest.mark.slow
@pytest.mark.chaos
def test_stages_die_while_they_start_and_while_others_take_over(
    config: TrainConfig, quiet: Path, tmp_path: Path
) -> None:
    strikes = (("load", 1, 0), ("forward", 1, 3), ("give", 0, 2), ("backward", 0, 6), ("change", 1, 5))
    pipeline = replace(config.pipeline, stages=3)
    marks = tmp_path / "marks"
    marks.mkdir()
    kinds = [TrainStrike(marks, *own) for own in strikes]
    output = tmp_path / "out"
    summary = train(replace(config, output=str(output), pipeline=pipeline), train_actor=struck(*kinds))
    assert_as_quiet(output, quiet)
    assert {"load-1-0-0", "forward-1-3-0", "backward-0-6-0", "change-1-5-0"} <= set(fallen(marks))
    assert summary.recoveries == 3


@pytest.mark.slow
@pytest.mark.chaos
def test_a_stage_that_hangs_is_ended(config: TrainConfig, quiet: Path, tmp_path: Path) -> None:
    pipeline = replace(config.pipeline, health_timeout_s=15)
    summary = disturbed(config, tmp_path, ("backward", 1, 3), strike=stop_oneself, pipeline=pipeline)
    assert_as_quiet(tmp_path / "out", quiet)
    assert summary.recoveries == 1


@pytest.mark.slow
@pytest.mark.chaos
def test_stages_without_copies_go_back_to_the_checkpoint(config: TrainConfig, quiet: Path, tmp_path: Path) -> None:
    summary = disturbed(config, tmp_path, ("forward", 1, 7), buddy_copies=False, checkpoint_every=2)
    assert_as_quiet(tmp_path / "out", quiet)
    assert summary.recoveries == 1
    assert summary.steps_lost in (1, 3), "from the checkpoint after six steps, or four where that was being written"


@pytest.mark.slow
@pytest.mark.chaos
def test_without_a_checkpoint_either_the_run_begins_again(config: TrainConfig, quiet: Path, tmp_path: Path) -> None:
    summary = disturbed(config, tmp_path, ("forward", 1, 5), buddy_copies=False)
    assert_as_quiet(tmp_path / "out", quiet)
    assert (summary.recoveries, summary.steps_lost) == (1, 5)


@pytest.mark.slow
@pytest.mark.chaos
def test_a_twin_gives_what_was_lost(config: TrainConfig, tmp_path: Path) -> None:
    pipeline = replace(config.pipeline, replicas=2)
    config = replace(config, pipeline=pipeline, microbatch_size=1)  # two microbatches for each replica
    train(replace(config, output=str(tmp_path / "calm")))
    summary = disturbed(config, tmp_path, ("backward", 1, 3))
    assert_as_quiet(tmp_path / "out", tmp_path / "calm")
    assert (summary.recoveries, summary.steps_lost) == (1, 1)


@pytest.mark.slow
@pytest.mark.chaos
def test_a_loop_of_crashes_ends_with_its_cause(config: TrainConfig, tmp_path: Path) -> None:
    strike = TrainStrike(tmp_path, "backward", 1, 2, times=9)
    pipeline = replace(config.pipeline, max_restarts=1)
    with pytest.raises(StageDiedError, match=r"stage 1 of replica 0 died.*given up after 3 failures") as raised:
        train(replace(config, output=str(tmp_path / "out"), pipeline=pipeline), train_actor=struck(strike))
    assert raised.value.exit_status == 4
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1]


class Resizing(Trainer):
    """Changes the number of stages before given steps."""

    plan: ClassVar = {4: 2, 6: 3}

    def _step(self, step: int) -> None:
        if step + 1 in self.plan:
            self._settle()
            self._saver.finish()
            self._live.resize(self.plan[step + 1], step)
            self._attach()
        super()._step(step)


@pytest.mark.slow
@pytest.mark.chaos
def test_four_then_two_then_three_stages(config: TrainConfig, quiet: Path, tmp_path: Path) -> None:
    pipeline = replace(config.pipeline, stages=4)
    Resizing(replace(config, output=str(tmp_path), pipeline=pipeline, min_stages=2)).run()
    assert_as_quiet(tmp_path, quiet)
    assert [line["stages"] for line in metrics(tmp_path)] == [4, 4, 4, 2, 2, 3, 3, 3]


class Patient(Trainer):
    """Waits before the fourth step until there is one stage more."""

    def _grow(self, done: int) -> None:
        before, deadline = self._live.num_stages, time.monotonic() + 60
        super()._grow(done)
        while done == 3 and self._live.num_stages == before and time.monotonic() < deadline:
            time.sleep(0.1)
            super()._grow(done)


@pytest.mark.slow
@pytest.mark.chaos
def test_a_run_grows_where_there_is_room(config: TrainConfig, quiet: Path, tmp_path: Path) -> None:
    Patient(replace(config, output=str(tmp_path), max_stages=3)).run()
    assert_as_quiet(tmp_path, quiet)
    assert [line["stages"] for line in metrics(tmp_path)] == [2, 2, 2, 3, 3, 3, 3, 3]
