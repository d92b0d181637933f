"""Stages, preparing workers and model steps that fail while a job runs on a real cluster.

The faults are in actor classes given to `caption` in place of its own, so that each strikes at a certain moment.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from ray_ministral import caption
from ray_ministral.config import StageOptions
from ray_ministral.driver import tasks
from ray_ministral.driver.stage_actor import StageActor
from ray_ministral.driver.summary import CaptionSummary
from ray_ministral.errors import PlacementError, TooManyErrorsError
from tests.cluster.inputs import BAD_PICTURES, GOOD_ROWS, make_config, picture, rows_of
from tests.cluster.strikes import prepare_with, remote

pytestmark = pytest.mark.usefixtures("clean_cluster")


@pytest.fixture(scope="module")
def undisturbed(
    cluster: None, model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CaptionSummary, Path]:
    """The pictures captioned without any fault."""
    output = tmp_path_factory.mktemp("undisturbed")
    return caption(make_config(model, pictures, output, stages=2)), output


def poisoned(places: set[tuple[int, ...]], *, fuse: Path | None = None) -> Any:
    """An actor class whose last stage refuses every step that has a prompt with one of these numbers of tokens.

    With a `fuse`, a file, it does so only as long as the file is there.
    """

    class Poisoned(StageActor):
        def load(self, options: StageOptions, *others: Any) -> Any:
            self._is_last = options.spec.is_last
            return super().load(options, *others)

        def step(self, plan: Any, hidden: Any, *blocks: Any) -> Any:
            lengths = {piece.length for piece in plan.prefills}
            if self._is_last and lengths & places and (fuse is None or fuse.exists()):
                raise FloatingPointError("these tokens taste bad")
            return super().step(plan, hidden, *blocks)

    return remote(Poisoned)


@pytest.fixture(scope="module")
def poison(undisturbed: tuple[CaptionSummary, Path]) -> tuple[set[int], int]:
    """The row with the longest prompt (or several that share it) and that length."""
    rows = [row for row in rows_of(undisturbed[1]) if row["status"] == "ok"]
    longest = max(row["prompt_tokens"] for row in rows)
    found = {row["id"] for row in rows if row["prompt_tokens"] == longest}
    assert 1 <= len(found) < len(rows) / 2
    return found, longest


def without(rows: list[dict[str, Any]], ids: set[int]) -> list[dict[str, Any]]:
    """Other rows, without their number of attempts: a neighbour of a bad row is tried twice, too."""
    return [{key: row[key] for key in row if key != "attempts"} for row in rows if row["id"] not in ids]


def test_a_step_that_fails_costs_only_the_rows_at_fault_and_they_can_be_retried(
    undisturbed: tuple[CaptionSummary, Path],
    poison: tuple[set[int], int],
    model: Path,
    pictures: Path,
    tmp_path: Path,
) -> None:
    ids, length = poison
    fuse = tmp_path / "fuse"
    fuse.touch()
    actor = poisoned({length}, fuse=fuse)
    config = make_config(model, pictures, tmp_path / "out", stages=2)
    summary = caption(config, stage_actor=actor)
    rows, expected = rows_of(tmp_path / "out"), rows_of(undisturbed[1])
    bad = [row for row in rows if row["id"] in ids]
    assert {row["status"] for row in bad} == {"engine_error"}
    assert all(row["attempts"] >= 2 for row in bad)
    assert {row["error_stage"] for row in bad} == {"prefill"}
    assert all("FloatingPointError: these tokens taste bad" in row["error"] for row in bad)
    assert without(rows, ids) == without(expected, ids)
    assert summary.status_counts["engine_error"] == len(ids)

    # The fault passes. Only the failed rows are done again, and the broken pictures are as broken as before.
    fuse.unlink()
    before = {part.name: part.stat().st_mtime_ns for part in (tmp_path / "out").glob("part-*")}
    retry = make_config(model, pictures, tmp_path / "out", stages=2, retry_failed=True)
    summary = caption(retry, stage_actor=actor)
    after = rows_of(tmp_path / "out")
    assert without(after, set()) == without(expected, set())
    first_attempts = {row["id"]: row["attempts"] for row in rows}
    for row in after:
        again = row["id"] in ids or row["source_row"] + 23 * row["source_row_group"] in BAD_PICTURES
        assert row["attempts"] == first_attempts[row["id"]] + again, row
    touched = {part.name for part in (tmp_path / "out").glob("part-*") if part.stat().st_mtime_ns != before[part.name]}
    failed_parts = {
        f"part-00000-{row['source_row_group']:05d}-{row['source_row'] // 8 * 8:08d}.parquet"
        for row in rows
        if row["status"] != "ok"
    }
    assert touched == failed_parts
    assert (summary.ok, summary.errors) == (GOOD_ROWS, len(BAD_PICTURES))
    assert (tmp_path / "out" / "_SUCCESS").exists()


def deadly(image: bytes, marks: Path, *, once: bool) -> Any:
    """`tasks.prepare` in which the decoder ends its process at one image, and leaves a mark each time."""

    def die(data: bytes) -> None:
        if data == image and not (once and any(marks.iterdir())):
            (marks / str(time.monotonic_ns())).touch()
            os._exit(1)

    return prepare_with(die)


@pytest.mark.parametrize("once", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["always", "once"])
def test_a_decoder_that_crashes_costs_its_row_only(
    undisturbed: tuple[CaptionSummary, Path],
    model: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    once: bool,
) -> None:
    (tmp_path / "marks").mkdir()
    monkeypatch.setattr(tasks, "prepare", deadly(picture(20), tmp_path / "marks", once=once))
    summary = caption(make_config(model, pictures, tmp_path / "out", stages=1))
    expected = rows_of(undisturbed[1])
    rows = rows_of(tmp_path / "out")
    assert len(list((tmp_path / "marks").iterdir())) == (1 if once else 3), "alone it is tried twice"
    if once:
        assert rows == expected
    else:
        assert [row["id"] for row in rows if row["status"] == "engine_error"] == [1020]
        (bad,) = [row for row in rows if row["id"] == 1020]
        assert "the worker that prepared this row died" in bad["error"]
        assert bad["error_stage"] == "decode"
        assert bad["caption"] is None
        assert without(rows, {1020}) == without(expected, {1020})
    assert summary.rows == len(rows) == len(expected)


def test_too_many_errors_leave_nothing_behind(cluster: None, model: Path, pictures: Path, tmp_path: Path) -> None:
    config = make_config(model, pictures, tmp_path / "out", stages=1, max_error_rate=0.05)
    with pytest.raises(TooManyErrorsError, match=r"^3 of 45 rows failed, more than --max-error-rate 0\.05"):
        caption(config)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_no_room_for_the_stages(cluster: None, model: Path, pictures: Path, tmp_path: Path) -> None:
    config = make_config(
        model, pictures, tmp_path / "out", stages=2, threads_per_stage=4, placement_timeout_s=3.0, replicas=1
    )
    started = time.monotonic()
    with pytest.raises(PlacementError, match=r"no room for 2 x 4 CPU within 3 s; .* of 6 CPU free: use fewer --stages"):
        caption(config)
    assert time.monotonic() - started < 60
