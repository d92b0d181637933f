"""The simulation of a large cluster, on small ones whose result is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.scale import (
    Costs,
    Failures,
    Replica,
    Workload,
    load_of,
    measure,
    play_cluster,
    play_replica,
    saturation,
)

SMALL = Workload(nodes=40, shards=2000, stages=4, step_seconds=0.1)
ONE = Replica(rows_per_step=1.0)
NEVER = Failures("none", float("inf"), "-")
OFTEN = Failures("often", 3600.0, "made up")


def test_without_failures_it_takes_what_it_must() -> None:
    outcome = play_cluster(SMALL, NEVER, ONE, seed=0)
    assert outcome.finished
    assert outcome.kept == pytest.approx(1.0)
    assert outcome.hours == pytest.approx(2000 * 256 / (10 * 10.0) / 3600)
    assert (outcome.deaths, outcome.retired) == (0, 0)


def test_the_same_seed_gives_the_same_and_another_one_does_not() -> None:
    assert play_cluster(SMALL, OFTEN, ONE, seed=1) == play_cluster(SMALL, OFTEN, ONE, seed=1)
    assert play_cluster(SMALL, OFTEN, ONE, seed=1) != play_cluster(SMALL, OFTEN, ONE, seed=2)
    assert play_replica(SMALL, 3) == play_replica(SMALL, 3)


def test_failures_cost_the_share_of_time_that_replicas_recover() -> None:
    """A replica loses one of four nodes every 15 minutes and is away for six, as long as the policy never gives up."""
    patient = replace(SMALL, shards=20_000, max_restarts=10_000)
    outcome = play_cluster(patient, OFTEN, ONE, seed=0)
    # Works for 900 s on average; then the last of the deaths is followed by 360 s without another one: renewal theory,
    # mean (e^(0.4) - 1) * 900 s.
    assert outcome.kept == pytest.approx(900 / (900 + 900 * (2.718281828**0.4 - 1)), rel=0.03)
    assert outcome.retired == 0


def test_the_policy_retires_replicas_that_die_in_vain() -> None:
    hopeless = Failures("hopeless", 100.0, "made up")
    outcome = play_cluster(SMALL, hopeless, ONE, seed=0)
    assert not outcome.finished
    assert outcome.retired == SMALL.replicas
    assert outcome.deaths >= SMALL.replicas * (SMALL.max_restarts + 1)
    assert outcome.kept < 0.1


def test_a_replica_finishes_what_its_rows_need() -> None:
    """In steady state a row takes `new` steps of one of its microbatches; the KV cache bounds how many there are."""
    played = play_replica(Workload(), seed=0)
    assert 42 / 64 * 0.8 < played.rows_per_step < 128 / 64
    longer = play_replica(replace(Workload(), new=128), seed=0)
    assert longer.rows_per_step < 0.7 * played.rows_per_step


def test_the_driver_saturates_where_one_part_of_its_load_is_one() -> None:
    costs = Costs(commit=1e-3, read_entry=0, entry_bytes=0, schedule=1e-3, call=1e-3, look=0, pulse=0)
    workload = replace(SMALL, nodes=400)
    load = load_of(workload, ONE, costs)
    assert load.steps == pytest.approx(100 / 0.1 * 5e-3)  # 100 replicas, 10 steps a second, one plan and four calls
    assert load.commits == pytest.approx(100 * 10 / 256 * 1e-3)
    assert saturation(workload, ONE, costs) == 400 // 5
    dear = replace(costs, commit=10.0)
    assert saturation(workload, ONE, dear) == int(400 / load_of(workload, ONE, dear).commits)


def test_the_costs_are_measured() -> None:
    costs = measure(SMALL, with_ray=False, parts=20, rounds=5)
    assert 1e-6 < costs.read_entry < costs.commit < 1
    assert 1e-6 < costs.schedule < 0.1
    assert 200 < costs.entry_bytes < 1000
