"""Stages on two nodes, and the memory of the driver: programs of their own, in processes of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cluster.commands import ROOT, started
from tests.cluster.inputs import rows_of, write_pictures

pytestmark = pytest.mark.slow

TWO_NODES = """
import json, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from ray_ministral.driver.captioner import Captioner
from tests.cluster.inputs import make_config

model, source, output = map(Path, sys.argv[1:])
node = {"num_cpus": 1, "object_store_memory": 100_000_000}
cluster = Cluster(initialize_head=True, head_node_args=node)
try:
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    captioner = Captioner(make_config(model, source, output, stages=2, placement_timeout_s=60.0))
    summary = captioner.run()
    (replica,) = captioner._replicas
    nodes = [report.node_id for report in replica.pipeline.loaded.values()]
    print("told: " + json.dumps({"ok": summary.ok, "nodes": nodes}))
finally:
    ray.shutdown()
    cluster.shutdown()
"""

MEMORY = """
import json, sys
from pathlib import Path
from ray_ministral.driver.captioner import Captioner
from ray_ministral.pipeline.stage import process_memory
from tests.cluster.inputs import make_config

model, source, output = map(Path, sys.argv[1:])
seen = []

class Watched(Captioner):
    def _note_commits(self):
        super()._note_commits()
        seen.append((self._tracker.totals.rows, process_memory()["rss"]))

Watched(make_config(model, source, output, rows_per_shard=40, max_new_tokens=2)).run()
print("told: " + json.dumps(seen))
"""


TOLD = "told: "


def run_program(program: str, *arguments: Path | str) -> str:
    """The last line that a program prints as it ends; a raylet that was killed leaves its own behind it."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with started(command, PYTHONPATH=str(ROOT)) as run:
        assert run.wait(500) == 0, run.stderr
        run.wait_for_no_process()
        told = [line.partition(TOLD)[2] for line in run.stdout.splitlines() if line.startswith(TOLD)]
        return told[-1]


def test_two_stages_on_two_nodes(model: Path, pictures: Path, tmp_path: Path) -> None:
    told = json.loads(run_program(TWO_NODES, model, pictures, tmp_path / "out"))
    assert len(set(told["nodes"])) == 2, "each node has one CPU, a stage wants one"
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == list(range(1000, 1045))
    assert told["ok"] == sum(row["status"] == "ok" for row in rows) == 40


def test_the_memory_of_the_driver_stays_flat(model: Path, tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "many.parquet", 2000, bad=False)
    seen: list[tuple[int, int]] = json.loads(run_program(MEMORY, model, source, tmp_path / "out"))
    early = max(rss for rows, rss in seen if rows <= 400)
    late = max(rss for rows, rss in seen if rows >= 1600)
    # The pixels of 1200 rows are 38 MB.
    assert late - early < 8e6, seen
