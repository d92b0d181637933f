"""Nodes that die under a training job, on a cluster of several nodes: programs of their own (`make chaos`)."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.test_nodes import run_program
from tests.cluster.train_runs import curve, final_weights, metrics, write_pairs

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

STEPS = 10
WHY_TWO = "an orphan may do its part of the step, and be gone before its commit has said so: then one had stepped"

PROGRAM = """
import json, os, signal, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from ray_ministral.config import OptimizerConfig, PipelineConfig, SampleConfig, TrainConfig
from ray_ministral.driver.trainer import Trainer

model, pairs, output = map(Path, sys.argv[1:4])
kind, steps = sys.argv[4], int(sys.argv[5])
node = {"num_cpus": 1, "object_store_memory": 150_000_000}
quick = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
cluster = Cluster(initialize_head=True, head_node_args=node | {"_system_config": quick})
told = {}

class Disturbed(Trainer):
    '''A node dies before the fourth step's gradients are there; another one comes before the seventh step.'''

    def _compute(self, step, *rest):
        if step == 3 and kind != "quiet" and not told:
            nodes = {self._live.replicas[0].loaded[s].node_id for s in range(self._live.num_stages)}
            head = ray.get_runtime_context().get_node_id()
            victims = [n for n in others if n.node_id in nodes]
            told["victims"] = len(victims)
            threading.Timer(0.05, os.kill, (victims[0].all_processes["raylet"][0].process.pid, signal.SIGKILL)).start()
        return super()._compute(step, *rest)

    def _grow(self, done):
        super()._grow(done)
        if kind == "shrink" and done == 6:
            wanted.set()
            deadline = time.monotonic() + 120
            while self._live.num_stages < 2 and time.monotonic() < deadline:
                time.sleep(0.1)
                super()._grow(done)

try:
    others = [cluster.add_node(**node)]
    if kind == "replace":
        others.append(cluster.add_node(**node))
    ray.init(address=cluster.address, log_to_driver=False)
    config = TrainConfig(
        model=str(model), train=(str(pairs),), output=str(output),
        samples=SampleConfig(response_column="response"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, clip_norm=0.1),
        pipeline=PipelineConfig(stages=2, threads_per_stage=1, dtype="float32", step_timeout_s=120),
        global_batch_size=4, microbatch_size=2, steps=steps, min_stages=1 if kind == "shrink" else None,
    )
    wanted = threading.Event()
    result = {}

    def run():
        try:
            result["summary"] = Disturbed(config).run()
        except BaseException as error:
            result["error"] = repr(error)
            raise

    # Nodes can be started by the main thread alone.
    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        if wanted.is_set():
            wanted.clear()
            cluster.add_node(**node)
        time.sleep(0.1)
    summary = result["summary"]
    told |= {"recoveries": summary.recoveries, "seconds": summary.recovery_seconds, "lost": summary.steps_lost}
    print("told: " + json.dumps(told))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet")


@pytest.fixture(scope="module")
def quiet(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quiet")
    run(model, pairs, output, "quiet")
    return output


def run(model: Path, pairs: Path, output: Path, kind: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(run_program(PROGRAM, model, pairs, output, kind, str(STEPS)))
    print(f"{kind}: {told}")
    return told


def assert_as_quiet(output: Path, quiet: Path) -> None:
    assert curve(metrics(output)) == curve(metrics(quiet))
    assert len(metrics(output)) == STEPS
    ours, theirs = final_weights(output), final_weights(quiet)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_node_dies_without_room_elsewhere_and_another_comes(
    model: Path, pairs: Path, quiet: Path, tmp_path: Path
) -> None:
    told = run(model, pairs, tmp_path, "shrink")
    assert_as_quiet(tmp_path, quiet)
    assert told["recoveries"] == 1
    assert 1 <= told["lost"] <= 2, WHY_TWO
    assert [stages for stages, _ in groupby(line["stages"] for line in metrics(tmp_path))] == [2, 1, 2]


def test_a_node_dies_and_its_buddy_has_a_copy(model: Path, pairs: Path, quiet: Path, tmp_path: Path) -> None:
    """There is a third node with room for a replacement; the state comes out of the memory of the node that is left."""
    told = run(model, pairs, tmp_path, "replace")
    assert_as_quiet(tmp_path, quiet)
    assert told["recoveries"] == 1
    assert 1 <= told["lost"] <= 2, WHY_TWO
    assert {line["stages"] for line in metrics(tmp_path)} == {2}
