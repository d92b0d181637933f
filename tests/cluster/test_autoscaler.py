"""cluster.yaml for real: Ray's autoscaler adds its nodes on this machine for a job, and takes them away afterwards.

The provider is Ray's own fake one, which starts a raylet where another one starts a machine; everything else of
the autoscaler is what `ray up` starts. A GPU of cluster.yaml becomes a CPU here, so the head has none. All listens on
the loopback; the head runs in the foreground, so that it ends with a process of ours, and nothing is stopped by name.

`ray.cluster_utils.AutoscalingCluster` is not used: it begins with `ray stop --force`, which ends every Ray process of
the machine, and reads a file that Ray's wheel lacks, as does the provider's name `fake_multinode` in a config.
"""

from __future__ import annotations

import json
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from tests.cluster.commands import ROOT, Run, caption_command, started
from tests.cluster.inputs import GOOD_ROWS, rows_of
from tests.cluster.processes import listening_addresses, wait_for
from tests.cluster.test_submit import RAY, TOKEN, free_port
from tests.cluster.train_runs import final_weights, metrics, train_options, write_pairs

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

IDLE_S = 6.0
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())


def on_this_machine(config: dict[str, Any], gcs: str) -> dict[str, Any]:
    """cluster.yaml with its node types and limits, for the fake provider. A GPU becomes a CPU."""
    types = {}
    for name, kind in config["available_node_types"].items():
        is_head = name == config["head_node_type"]
        resources = {"CPU": kind["resources"].get("GPU", 0)}
        types[FAKE_HEAD_NODE_TYPE if is_head else name] = {
            "resources": resources if is_head else resources | {"object_store_memory": 100_000_000},
            "min_workers": kind["min_workers"],
            "max_workers": kind["max_workers"],
            "node_config": {},
        }
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": gcs,
        "launch_multiple": True,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    kept = {key: config[key] for key in ("cluster_name", "max_workers", "upscaling_speed")}
    nothing = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return kept | {
        **{f"{which}_commands": [] for which in nothing},
        "file_mounts": {},
        "cluster_synced_files": [],
        "provider": provider,
        "auth": {},
        "available_node_types": types,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "idle_timeout_minutes": IDLE_S / 60,
    }


@dataclass(frozen=True)
class Autoscaled:
    run: Run
    dashboard: str
    gcs: str

    def workers(self) -> list[dict[str, Any]]:
        """All that were ever there, with their state and the type that cluster.yaml gives them."""
        request = urllib.request.Request(
            self.dashboard + "/api/v0/nodes?detail=1", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            nodes: list[dict[str, Any]] = json.loads(answer.read())["data"]["result"]["result"]
        return [node for node in nodes if not node["is_head_node"]]

    def alive(self) -> list[dict[str, Any]]:
        return [node for node in self.workers() if node["state"] == "ALIVE"]

    def is_up(self) -> bool:
        with suppress(OSError):
            self.workers()
            return True
        return False

    def job(self, command: list[str]) -> str:
        """Run a command to its end; returns its log."""
        environment = {"HOME": str(self.run.folder), "RAY_AUTH_MODE": "token", **LOOPBACK}
        with started(command, **environment) as job:
            assert job.wait() == 0, job.stderr + self.run.stdout + self.run.stderr
            return job.stdout + job.stderr


LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's switch between machines and the loopback


@pytest.fixture(scope="module")
def cluster() -> Iterator[Autoscaled]:
    port, dashboard_port = free_port(), free_port()
    config = json.dumps(on_this_machine(CLUSTER, f"127.0.0.1:{port}"))
    command = (
        f"mkdir -m 700 ~/.ray; echo -n {TOKEN} > ~/.ray/auth_token; echo '{config}' > ~/cluster.json; "
        f"exec {RAY} start --head --block --port={port} --dashboard-port={dashboard_port} --num-cpus=0"
        f" --dashboard-agent-listen-port={free_port()} --object-store-memory=100000000 --disable-usage-stats"
        " --temp-dir=$RAY_TMPDIR --autoscaling-config=$HOME/cluster.json"
    )
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        # As `ray up` has it.
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
        **LOOPBACK,
    }
    with started(["bash", "-c", command], **environment) as run:
        cluster = Autoscaled(run, f"http://127.0.0.1:{dashboard_port}", f"127.0.0.1:{port}")
        wait_for(lambda: cluster.is_up() or run.process.poll() is not None, 120, lambda: run.stdout + run.stderr)
        assert run.process.poll() is None, run.stdout + run.stderr
        yield cluster
        # Ctrl-C ends at once; on SIGTERM a node is drained first, for half a minute.
        run.process.send_signal(signal.SIGINT)
        with suppress(AssertionError):
            run.wait(20)


def check_nodes_came_and_went(cluster: Autoscaled, before: int, job_ended: float) -> None:
    """Workers for two stages, of the sizes that cluster.yaml has, and none is left soon after.

    They are told by their size: the fake provider gives them the head's type, which it finds in its environment.
    """
    added = [node["resources_total"]["CPU"] for node in cluster.workers()[before:]]
    types = CLUSTER["available_node_types"].values()
    assert set(added) <= {kind["resources"].get("GPU", 0) for kind in types} - {0}
    assert sum(added) >= 2
    assert len(added) <= CLUSTER["max_workers"]
    wait_for(lambda: not cluster.alive(), IDLE_S + 60, lambda: f"not given back: {cluster.alive()}")
    print(f"nodes with {added} CPUs were gone {time.monotonic() - job_ended:.1f} s after the job")


def test_a_captioning_job_gets_its_nodes(cluster: Autoscaled, model: Path, pictures: Path, tmp_path: Path) -> None:
    before = len(cluster.workers())
    assert not cluster.alive()
    log = cluster.job(caption_command(model, pictures, tmp_path / "out", "--stages", 2, "--address", cluster.gcs))
    ended = time.monotonic()
    assert [row["id"] for row in rows_of(tmp_path / "out")] == list(range(1000, 1045))
    assert sum(row["status"] == "ok" for row in rows_of(tmp_path / "out")) == GOOD_ROWS
    assert "with --device cuda they wait" in log, "the head has no GPU, and the cluster grows"
    addresses = listening_addresses(set(cluster.run.processes()))
    assert addresses
    loopback = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    assert {address.partition(":")[0] for address in addresses} <= set(loopback)
    check_nodes_came_and_went(cluster, before, ended)


def test_a_training_job_gets_its_nodes(cluster: Autoscaled, model: Path, tmp_path: Path) -> None:
    before = len(cluster.workers())
    pairs = write_pairs(tmp_path / "pairs.parquet")
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *train_options(model, pairs, tmp_path / "out")]
    cluster.job([*command, "--stages", "2", "--steps", "3", "--address", cluster.gcs])
    ended = time.monotonic()
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3]
    assert final_weights(tmp_path / "out")
    check_nodes_came_and_went(cluster, before, ended)


def test_what_no_node_type_brings_is_said(cluster: Autoscaled, model: Path, pictures: Path, tmp_path: Path) -> None:
    """`--device cuda` waits on a cluster that grows; its autoscaler has no GPUs here, and the job says so."""
    command = caption_command(model, pictures, tmp_path / "out", "--device", "cuda", "--address", cluster.gcs)
    environment = {"HOME": str(cluster.run.folder), "RAY_AUTH_MODE": "token", **LOOPBACK}
    with started(command, **environment) as job:
        wait_for(lambda: "nothing to add" in job.stdout + job.stderr, 90, lambda: job.stdout + job.stderr)
        assert "waiting for room for 1 x 1 CPU, 1 GPU; the cluster has" in job.stdout + job.stderr
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(60) == 130, job.stderr
