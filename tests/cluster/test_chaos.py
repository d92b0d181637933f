"""Nodes that die under a captioning job, on a cluster of several nodes: programs of their own (`make chaos`)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_ministral import caption
from tests.cluster.commands import ROOT, caption_command, started
from tests.cluster.inputs import make_config, rows_of, write_pictures
from tests.cluster.processes import wait_for
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

HEAD = """
import os, signal, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 150_000_000})
try:
    print("address: " + cluster.address, flush=True)
    while not Path("kill").exists():
        time.sleep(0.1)
    for kind in ("gcs_server", "raylet"):
        os.kill(cluster.head_node.all_processes[kind][0].process.pid, signal.SIGKILL)
    print("killed", flush=True)
    time.sleep(600)
finally:
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


def test_the_head_dies(expected: list[Any], model: Path, source: Path, tmp_path: Path) -> None:
    """The job ends with a status and a message of its own; the same job goes on with another cluster."""
    options = ["--stages", 2, "--rows-per-shard", 50, "--with-token-ids", "--temperature", 0.7, "--seed", 5]
    options += ["--max-new-tokens", 16]
    output = tmp_path / "out"
    with started([sys.executable, "-c", HEAD], PYTHONPATH=str(ROOT)) as head:
        wait_for(lambda: "address: " in head.stdout, 60, lambda: head.stderr)
        address = head.stdout.partition("address: ")[2].split()[0]
        with started(caption_command(model, source, output, *options, "--address", address)) as run:
            wait_for(lambda: bool(re.search(r"[1-9]\d*/1200 rows", run.stderr)), 120, lambda: run.stderr)
            (head.folder / "kill").touch()
            assert run.wait(120) == 4, run.stderr
            assert f"the head of the cluster, {address}, has not answered" in run.stderr
    assert len(list(output.glob("part-*"))) < ROWS / 50
    with started(caption_command(model, source, output, *options)) as run:
        assert run.wait(200) == 0, run.stderr
    assert told_of(output) == expected
