"""A stage that dies, hangs or cannot start is replaced alone, and the captions come out as if nothing had happened."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ray_ministral import caption
from ray_ministral.data.shards import Shard
from ray_ministral.driver.replica import sample_key
from ray_ministral.driver.stage_actor import StageActor
from ray_ministral.driver.summary import CaptionSummary
from ray_ministral.errors import ClusterError, StageDiedError
from tests.cluster.inputs import BAD_PICTURES, GOOD_ROWS, make_config, rows_of
from tests.cluster.processes import is_alive, wait_for
from tests.cluster.strikes import Strike, kill_oneself, remote, stop_oneself, struck

pytestmark = pytest.mark.usefixtures("clean_cluster")

SAMPLING: dict[str, Any] = {"temperature": 0.8, "seed": 3, "with_token_ids": True}
"""Random numbers depend on row and position alone: so sampled captions, too, come out the same."""


@pytest.fixture(scope="module")
def expected(
    cluster: None, model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The rows of a run without any fault."""
    output = tmp_path_factory.mktemp("undisturbed")
    caption(make_config(model, pictures, output, stages=2, **SAMPLING))
    return without_attempts(rows_of(output))


def without_attempts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row that was on a stage when it died has one attempt more."""
    return [{key: row[key] for key in row if key != "attempts"} for row in rows]


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def pids(marks: Path) -> list[int]:
    return [int(mark.read_text().split()[0]) for mark in sorted(marks.iterdir())]


def run(actor: Any, model: Path, pictures: Path, tmp_path: Path, **changes: Any) -> CaptionSummary:
    config = make_config(model, pictures, tmp_path / "out", **{"stages": 2, **SAMPLING, **changes})
    summary = caption(config, stage_actor=actor)
    assert summary.ok == GOOD_ROWS
    assert summary.rows == GOOD_ROWS + len(BAD_PICTURES)
    assert (tmp_path / "out" / "_SUCCESS").exists()
    return summary


@pytest.mark.parametrize(
    ("first", "at"),
    [
        (True, "load"),
        (False, "prefill"),
        (True, "decode"),
        pytest.param(False, "load", marks=pytest.mark.slow),
        pytest.param(True, "prefill", marks=pytest.mark.slow),
        pytest.param(False, "decode", marks=pytest.mark.slow),
    ],
)
def test_a_dead_stage_is_replaced(
    expected: list[dict[str, Any]],
    model: Path,
    pictures: Path,
    tmp_path: Path,
    marks: Path,
    first: bool,
    at: str,
) -> None:
    summary = run(struck(Strike(marks, at, first)), model, pictures, tmp_path)
    assert len(pids(marks)) == 1
    assert without_attempts(rows_of(tmp_path / "out")) == expected
    assert summary.recoveries == 1
    assert (summary.recomputed_tokens > 0) == (at != "load")


@pytest.mark.slow
@pytest.mark.parametrize("at", ["load", "prefill", "decode"])
def test_a_dead_stage_in_the_middle_is_replaced(
    expected: list[dict[str, Any]], model: Path, pictures: Path, tmp_path: Path, marks: Path, at: str
) -> None:
    run(struck(Strike(marks, at, None)), model, pictures, tmp_path, stages=3)
    assert without_attempts(rows_of(tmp_path / "out")) == expected


def test_a_spare_stands_in_and_then_the_next_one(
    expected: list[dict[str, Any]], model: Path, pictures: Path, tmp_path: Path, marks: Path
) -> None:
    (marks / "one").mkdir()
    (marks / "two").mkdir()
    actor = struck(Strike(marks / "one", "decode", False), Strike(marks / "two", "restart", True))
    summary = run(actor, model, pictures, tmp_path, spares=2)
    assert without_attempts(rows_of(tmp_path / "out")) == expected
    assert summary.recoveries == 1, "one that dies while another is replaced belongs to the same recovery"
    struck_at = [float((marks / name / "0").read_text().split()[1]) for name in ("one", "two")]
    born = [float(line) for line in (marks / "loads").read_text().splitlines()]
    assert len(born) == 4
    assert max(born[2:]) < min(struck_at), "both were there before"


@pytest.mark.slow
def test_two_at_once(expected: list[dict[str, Any]], model: Path, pictures: Path, tmp_path: Path, marks: Path) -> None:
    class Both(StageActor):
        def step(self, plan: Any, hidden: Any, *blocks: Any) -> Any:
            mine = marks / ("first" if self._stage and self._stage.spec.is_first else "last")
            if plan.step >= 4 and not mine.exists():
                mine.touch()
                deadline = time.monotonic() + 5
                while len(list(marks.iterdir())) < 2 and time.monotonic() < deadline:
                    time.sleep(0.01)
                kill_oneself()
            return super().step(plan, hidden, *blocks)

    run(remote(Both), model, pictures, tmp_path)
    assert without_attempts(rows_of(tmp_path / "out")) == expected


@pytest.mark.parametrize("at", ["decode", pytest.param("load", marks=pytest.mark.slow)])
def test_a_stopped_stage_is_ended_and_replaced(
    expected: list[dict[str, Any]], model: Path, pictures: Path, tmp_path: Path, marks: Path, at: str
) -> None:
    actor = struck(Strike(marks, at, False, strike=stop_oneself))
    run(actor, model, pictures, tmp_path, health_timeout_s=6.0)
    assert without_attempts(rows_of(tmp_path / "out")) == expected
    (pid,) = pids(marks)
    wait_for(lambda: not is_alive(pid), 15, lambda: "the stopped stage is still there")


def test_a_stage_that_never_comes_out_of_a_step_is_replaced(
    expected: list[dict[str, Any]], model: Path, pictures: Path, tmp_path: Path, marks: Path
) -> None:
    actor = struck(Strike(marks, "decode", True, strike=lambda: time.sleep(1000)))
    run(actor, model, pictures, tmp_path, step_timeout_s=4.0)
    assert without_attempts(rows_of(tmp_path / "out")) == expected
    (pid,) = pids(marks)
    wait_for(lambda: not is_alive(pid), 15, lambda: "the stage is still in its step")


def test_a_step_that_nobody_accounts_for_ends_the_job(model: Path, pictures: Path, tmp_path: Path, marks: Path) -> None:
    """All stages answer, none is in a step, and the step does not come back."""
    actor = struck(Strike(marks, "call", True, strike=lambda: time.sleep(1000)))
    config = make_config(model, pictures, tmp_path / "out", stages=2, step_timeout_s=4.0, health_timeout_s=2.0)
    with pytest.raises(ClusterError, match=r"nothing has come back for .* though all stages answer; under way: . step"):
        caption(config, stage_actor=actor)


@pytest.mark.slow
def test_a_stage_that_never_comes_out_of_loading_ends_the_job(
    model: Path, pictures: Path, tmp_path: Path, marks: Path
) -> None:
    actor = struck(Strike(marks, "load", False, strike=lambda: time.sleep(1000)))
    config = make_config(model, pictures, tmp_path / "out", stages=2, start_timeout_s=25.0)
    with pytest.raises(StageDiedError, match="start_timeout_s"):
        caption(config, stage_actor=actor)


def test_a_slow_stage_is_left_alone(
    expected: list[dict[str, Any]], model: Path, pictures: Path, tmp_path: Path
) -> None:
    class Slower(StageActor):
        def step(self, plan: Any, hidden: Any, *blocks: Any) -> Any:
            time.sleep(min(1.5, 0.01 * plan.step))
            return super().step(plan, hidden, *blocks)

    summary = run(remote(Slower), model, pictures, tmp_path, health_timeout_s=1.0, step_timeout_s=4.0)
    assert summary.recoveries == 0
    assert without_attempts(rows_of(tmp_path / "out")) == expected


def test_a_crash_loop_ends_with_its_cause(model: Path, pictures: Path, tmp_path: Path, marks: Path) -> None:
    config = make_config(model, pictures, tmp_path / "out", stages=2, max_restarts=1)
    with pytest.raises(ClusterError, match="stage 1 of replica 0 died") as raised:
        caption(config, stage_actor=struck(Strike(marks, "load", False, times=99)))
    assert "given up after 2 deaths" in str(raised.value)
    assert "--max-restarts 1" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1, "the command line shows it as one line"
    assert raised.value.exit_status == 4
    assert len(pids(marks)) == 2
    summary = caption(config)
    assert summary.ok == GOOD_ROWS


@pytest.mark.slow
def test_a_row_that_kills_a_stage_each_time_is_given_up(
    expected: list[dict[str, Any]], model: Path, pictures: Path, tmp_path: Path, marks: Path
) -> None:
    longest = max(row["prompt_tokens"] for row in expected)
    poison = {row["id"] for row in expected if row["prompt_tokens"] == longest}

    # By their keys: a row that is fed again, with what it has said, is as long as these at some time.
    keys = {
        sample_key(Shard(0, str(pictures), 0, row["source_row_group"], 0, 1, ""), row["source_row"])
        for row in expected
        if row["id"] in poison
    }

    class Poisoned(StageActor):
        def step(self, plan: Any, hidden: Any, *blocks: Any) -> Any:
            last = self._stage is not None and self._stage.spec.is_last
            if last and keys.intersection(plan.sample_keys[plan.num_decode :].tolist()):
                kill_oneself()
            return super().step(plan, hidden, *blocks)

    output = tmp_path / "out"
    config = make_config(model, pictures, output, stages=2, spares=1, max_new_tokens=8, with_token_ids=True)
    undisturbed = make_config(
        model, pictures, tmp_path / "undisturbed", stages=2, max_new_tokens=8, with_token_ids=True
    )
    caption(undisturbed)
    summary = caption(config, stage_actor=remote(Poisoned))
    rows = rows_of(output)
    bad = [row for row in rows if row["id"] in poison]
    assert {row["status"] for row in bad} == {"engine_error"}
    assert all("a stage died each time that this row was on it" in row["error"] for row in bad)
    assert summary.status_counts["engine_error"] == len(poison)
    good = [row for row in without_attempts(rows) if row["id"] not in poison]
    assert good == [row for row in without_attempts(rows_of(tmp_path / "undisturbed")) if row["id"] not in poison]


def test_another_replica_takes_the_rows(
    expected: list[dict[str, Any]], model: Path, pictures: Path, tmp_path: Path, marks: Path
) -> None:
    run(struck(Strike(marks, "decode", False)), model, pictures, tmp_path, replicas=2)
    assert without_attempts(rows_of(tmp_path / "out")) == expected
