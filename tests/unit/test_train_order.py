"""The order of samples: complete, of the seed and the epoch alone, and the same for every way to cut it into steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ray_ministral.config import SampleConfig, TrainConfig
from ray_ministral.driver.train_job import TrainJob
from ray_ministral.errors import ConfigError, InputError
from ray_ministral.training.order import DATA_IN_MEMORY, Cursor, SampleOrder, choose_window, order_state, plan_order

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def orders(num_samples: int, seed: int = 0) -> list[SampleOrder]:
    """One permutation of all, and two with windows (of one row group and less, and of several)."""
    groups = [num_samples // 3, 0, num_samples // 2]
    groups.append(num_samples - sum(groups))
    return [
        SampleOrder(num_samples, seed),
        SampleOrder(num_samples, seed, group_rows=groups, window=max(1, num_samples // 7)),
        SampleOrder(num_samples, seed, group_rows=groups, window=num_samples),
    ]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 10, 97, 1000])
def test_every_epoch_has_every_sample_once(num_samples: int) -> None:
    for order in orders(num_samples):
        for epoch in range(5):
            assert sorted(order.permutation(epoch).tolist()) == list(range(num_samples))


def test_epochs_and_seeds_differ() -> None:
    for make in range(3):
        permutations = [
            tuple(orders(100, seed)[make].permutation(epoch).tolist()) for seed in (0, 1, 2**62) for epoch in range(4)
        ]
        assert len(set(permutations)) == 12
        assert tuple(range(100)) not in permutations


def test_the_order_is_pinned() -> None:
    """A run may be resumed with another version of numpy or of us: these values must never change."""
    assert SampleOrder(10, 0).permutation(0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert SampleOrder(10, 7).permutation(3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]
    windowed = SampleOrder(10, 7, group_rows=[4, 4, 2], window=5)
    assert windowed.permutation(3).tolist() == [2, 3, 0, 8, 1, 9, 7, 5, 4, 6]


def test_the_permutation_is_a_fair_one() -> None:
    """Every sample is about as often in every place: chi squared of a table of 8 x 8 over 4000 epochs."""
    order = SampleOrder(8, 3)
    table = np.zeros((8, 8))
    for epoch in range(4000):
        table[np.arange(8), order.permutation(epoch)] += 1
    chi_squared = float(((table - 500) ** 2 / 500).sum())
    # 49 degrees of freedom: mean 49, standard deviation 9.9
    assert 20 < chi_squared < 90


@pytest.mark.parametrize("global_batch_size", [1, 3, 16, 100, 101, 250])
def test_steps_follow_each_other_without_a_seam(global_batch_size: int) -> None:
    for order in orders(101, 5):
        stream = [*order.permutation(0), *order.permutation(1), *order.permutation(2)]
        steps = len(stream) // global_batch_size
        got = [sample for step in range(steps) for sample in order.step_samples(step, global_batch_size)]
        assert got == stream[: steps * global_batch_size]
        assert all(len(order.step_samples(step, global_batch_size)) == global_batch_size for step in range(steps))


@pytest.mark.parametrize(("epochs", "global_batch_size"), [(1, 7), (3, 10), (2, 100), (2, 33)])
def test_the_union_over_the_steps_is_the_data(epochs: int, global_batch_size: int) -> None:
    order = SampleOrder(100, 1)
    steps = order.num_steps(epochs, global_batch_size)
    counts = Counter(sample for step in range(steps) for sample in order.step_samples(step, global_batch_size))
    assert set(counts) == set(range(100))
    assert set(counts.values()) <= {epochs, epochs + 1}
    assert sum(counts.values()) - epochs * 100 < global_batch_size
    fewer = Counter(sample for step in range(steps - 1) for sample in order.step_samples(step, global_batch_size))
    assert any(fewer[sample] < epochs for sample in range(100))


def test_a_run_goes_on_from_any_cursor_with_another_batch_size() -> None:
    order = SampleOrder(23, 9)
    whole, _ = order.take(Cursor(), 100)
    for first in (0, 1, 22, 23, 24, 46, 70):
        taken, cursor = order.take(Cursor(), first)
        assert cursor == Cursor(first // 23, first % 23)
        rest: list[int] = []
        resumed = SampleOrder(23, 9)
        for size in (7, 1, 22):
            more, cursor = resumed.take(cursor, size)
            rest.extend(more)
        assert (*taken, *rest) == whole[: first + 30]


def test_the_cursor_of_a_step() -> None:
    order = SampleOrder(10, 0)
    assert order.cursor_at(0, 4) == Cursor(0, 0)
    assert order.cursor_at(2, 4) == Cursor(0, 8)
    assert order.cursor_at(5, 4) == Cursor(2, 0)
    assert order.take(order.cursor_at(2, 4), 4)[1] == order.cursor_at(3, 4) == Cursor(1, 2)


def test_far_epochs_need_no_history() -> None:
    once = SampleOrder(50, 4)
    walked = SampleOrder(50, 4)
    for epoch in range(40):
        walked.permutation(epoch)
    assert np.array_equal(once.permutation(39), walked.permutation(39))


def test_windows_keep_row_groups_together() -> None:
    group_rows, window = [100] * 20, 300
    order = SampleOrder(2000, 2, group_rows=group_rows, window=window)
    permutation = order.permutation(0)
    groups = permutation // 100
    for start in range(0, 2000, window):
        assert len(set(groups[start : start + window].tolist())) == len(groups[start : start + window]) // 100
    # row groups come in an order of their own, and samples are mixed over the window
    assert list(dict.fromkeys((permutation[::window] // 100).tolist())) != list(range(0, 20, 3))
    assert (np.diff(groups[:window]) != 0).mean() > 0.5


def test_a_row_group_may_be_larger_than_a_window() -> None:
    order = SampleOrder(100, 0, group_rows=[90, 10], window=20)
    assert sorted(order.permutation(0).tolist()) == list(range(100))


def test_no_samples_and_wrong_windows() -> None:
    with pytest.raises(InputError, match="--train has no rows"):
        SampleOrder(0, 0)
    with pytest.raises(ValueError, match="go together"):
        SampleOrder(4, 0, window=2)
    with pytest.raises(ValueError, match="wanted 4"):
        SampleOrder(4, 0, group_rows=[1, 2], window=2)
    with pytest.raises(ValueError, match="a window needs a sample"):
        SampleOrder(4, 0, group_rows=[1, 3], window=0)


def test_nobody_can_change_a_permutation() -> None:
    with pytest.raises(ValueError, match="read-only"):
        SampleOrder(4, 0).permutation(0)[0] = 3


def test_what_fits_into_memory_is_one_permutation() -> None:
    assert choose_window(1000, 400, room=400) is None
    assert choose_window(1000, 401, room=400) == 498
    assert choose_window(1000, 400_000, room=400) == 1
    assert choose_window(3, 10**12, room=400) == 1
    assert choose_window(0, 0) is None


def test_the_order_follows_from_the_data_and_a_run_keeps_its_own() -> None:
    rows = [400, 300, 300]
    small = plan_order(rows, [DATA_IN_MEMORY // 4] * 3, seed=2)
    assert np.array_equal(small.permutation(0), SampleOrder(1000, 2).permutation(0))
    large = plan_order(rows, [DATA_IN_MEMORY] * 3, seed=2)
    assert np.array_equal(large.permutation(1), SampleOrder(1000, 2, group_rows=rows, window=166).permutation(1))

    for order in (small, large):
        held = order_state(rows, order)
        # another version of us, with another idea of what is large, goes on with the order that the run had
        again = plan_order(rows, [1, 1, 1], seed=2, held=held | {"seed": 2})
        assert np.array_equal(again.permutation(3), order.permutation(3))
        with pytest.raises(ConfigError, match=r"--train changed .*rows: 1000 -> 1001.*row_groups: 3 -> 4"):
            plan_order([*rows, 1], [1, 1, 1, 1], seed=2, held=held)
    # a run of a version that said nothing had one permutation
    assert plan_order(rows, [DATA_IN_MEMORY] * 3, seed=2, held={}).window is None


def test_a_job_that_goes_on_keeps_the_window_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_ministral.training.order.choose_window", lambda *_: 7)
    config = TrainConfig(
        model=str(EXAMPLES / "model"),
        train=(str(EXAMPLES / "pictures.parquet"),),
        output=str(tmp_path / "run"),
        samples=SampleConfig(response_column="expected"),
        steps=5,
    )
    job = TrainJob.plan_job(config)
    assert job.order.window == 7
    state = job.state(2)
    kept = {"rows": 306, "row_groups": 5, "window": 7}
    assert {name: state.config[name] for name in kept} == kept

    monkeypatch.setattr("ray_ministral.training.order.choose_window", lambda *_: None)
    monkeypatch.setattr("ray_ministral.driver.train_job.read_state", lambda _: state)
    resumed = TrainJob.plan_job(replace(config, resume=str(tmp_path)))
    assert resumed.first_step == 2
    assert resumed.order.step_samples(3, 16) == job.order.step_samples(3, 16)
    assert TrainJob.plan_job(config).order.step_samples(3, 16) != job.order.step_samples(3, 16)

    state = replace(state, config={**state.config, "rows": 305})
    with pytest.raises(ConfigError, match=r"--train changed since the last checkpoint \(rows: 305 -> 306\)"):
        TrainJob.plan_job(replace(config, resume=str(tmp_path)))
