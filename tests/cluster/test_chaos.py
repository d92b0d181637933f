"""Nodes that die under a captioning job, on a cluster of several nodes: programs of their own (`make chaos`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ray_ministral import caption
from tests.cluster.inputs import make_config, rows_of, write_pictures
from tests.cluster.test_nodes import run_program

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

ROWS = 1200
OPTIONS: dict[str, Any] = {"temperature": 0.7, "seed": 5, "with_token_ids": True, "max_new_tokens": 16}

NODES = """
import json, os, signal, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from ray_ministral.driver.captioner import Captioner
from tests.cluster.inputs import make_config

model, source, output = map(Path, sys.argv[1:4])
how, options = sys.argv[4], json.loads(sys.argv[5])
node = {"num_cpus": 1, "object_store_memory": 150_000_000}
quick = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
cluster = Cluster(initialize_head=True, head_node_args=node | {"_system_config": quick})
try:
    victim = cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    layout = {"stages": 1, "replicas": 2} if "replica" in how else {"stages": 2}
    config = make_config(model, source, output, rows_per_shard=50, **layout, **options)
    captioner = Captioner(config)
    told = {}

    def run():
        told["summary"] = captioner.run()

    # Nodes can be started by the main thread alone.
    thread = threading.Thread(target=run)
    thread.start()
    while not hasattr(captioner, "_tracker") or captioner._tracker.totals.rows < 100:
        time.sleep(0.05)
    if how == "raylet":
        process = victim.all_processes["raylet"][0].process
        os.kill(process.pid, signal.SIGKILL)
    else:
        cluster.remove_node(victim, allow_graceful=False)
    told["rows then"] = captioner._tracker.totals.rows
    if how != "replica for good":
        time.sleep(3)
        cluster.add_node(**node)
    thread.join()
    summary = told.pop("summary")
    told |= {"ok": summary.ok, "recoveries": summary.recoveries, "seconds": summary.recovery_seconds}
    print("told: " + json.dumps(told))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("input") / "pictures.parquet", ROWS, bad=False)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough rows for a replica to be back before they are done."""
    return write_pictures(tmp_path_factory.mktemp("input") / "more.parquet", 3 * ROWS, bad=False)


@pytest.fixture(scope="module")
def expected(cluster: None, model: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    output = tmp_path_factory.mktemp("undisturbed")
    caption(make_config(model, source, output, stages=2, rows_per_shard=50, **OPTIONS))
    return told_of(output)


def told_of(output: Path) -> list[Any]:
    return [(row["id"], row["status"], row["caption"], row["token_ids"]) for row in rows_of(output)]


@pytest.mark.parametrize("how", ["raylet", "node"])
def test_a_node_dies(how: str, expected: list[Any], model: Path, source: Path, tmp_path: Path) -> None:
    """A raylet alone, whose stage lives on as an orphan; a whole node. There is no room until another one is added."""
    output = tmp_path / "out"
    told = json.loads(run_program(NODES, model, source, output, how, json.dumps(OPTIONS)))
    assert told["ok"] == ROWS
    assert told["rows then"] < ROWS
    assert told_of(output) == expected
    assert told["recoveries"] == 1
    assert not list(output.glob("_tmp*"))


def test_the_node_of_one_of_two_replicas_dies_for_good(
    expected: list[Any], model: Path, source: Path, tmp_path: Path
) -> None:
    """The other one does the rest, on a node whose one CPU it has."""
    output = tmp_path / "out"
    told = json.loads(run_program(NODES, model, source, output, "replica for good", json.dumps(OPTIONS)))
    assert told["ok"] == ROWS
    assert told["rows then"] < ROWS
    assert told["recoveries"] == 0
    assert told_of(output) == expected


def test_a_replica_comes_back_on_another_node(model: Path, more: Path, tmp_path: Path) -> None:
    told = json.loads(run_program(NODES, model, more, tmp_path / "out", "replica", json.dumps(OPTIONS)))
    assert told["ok"] == 3 * ROWS
    assert told["recoveries"] == 1
    assert [row["id"] for row in rows_of(tmp_path / "out")] == list(range(1000, 1000 + 3 * ROWS))
