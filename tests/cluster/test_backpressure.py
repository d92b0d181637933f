"""What is slow makes the rest wait: rows in the object store and parts on their way out stay few, and a slow replica
takes fewer rows than a fast one.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_ministral.data.ledger import Ledger
from ray_ministral.data.parts import PartInfo
from ray_ministral.driver.captioner import Captioner
from ray_ministral.driver.part_writer import PARTS_AHEAD
from ray_ministral.driver.stage_actor import ACTOR_OPTIONS, StageActor
from tests.cluster.inputs import make_config, rows_of, write_pictures
from tests.cluster.test_nodes import run_program

SLOW_STAGE = """
import json, sys, threading, time
from pathlib import Path
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.cluster_utils import Cluster
from ray_ministral.driver.captioner import Captioner
from ray_ministral.driver.stage_actor import ACTOR_OPTIONS, StageActor
from tests.cluster.inputs import make_config

class Slow(StageActor):
    def step(self, plan, hidden, *blocks):
        time.sleep(0.25)
        return super().step(plan, hidden, *blocks)

model, source, output = map(Path, sys.argv[1:4])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 80_000_000})
try:
    ray.init(address=cluster.address, log_to_driver=False)
    state = get_state_from_address(cluster.address)
    seen = []

    def look():
        while True:
            stats = get_memory_info_reply(state).store_stats
            seen.append((stats.object_store_bytes_used, stats.spilled_bytes_total))
            time.sleep(0.2)

    threading.Thread(target=look, daemon=True).start()
    config = make_config(model, source, output, stages=2, rows_per_shard=100, rows_per_microbatch=32, max_new_tokens=2)
    summary = Captioner(config, stage_actor=ray.remote(**ACTOR_OPTIONS)(Slow)).run()
    used, spilled = map(max, zip(*seen))
    print("told: " + json.dumps({"ok": summary.ok, "used": used, "spilled": spilled, "looks": len(seen)}))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
def test_pixels_wait_for_a_slow_stage(model: Path, tmp_path: Path) -> None:
    """All pixels together are more than the object store has; what is there at a time is a small part of it."""
    rows = 3000
    source = write_pictures(tmp_path / "pictures.parquet", rows, bad=False)
    told = json.loads(run_program(SLOW_STAGE, model, source, tmp_path / "out"))
    assert told["ok"] == rows
    assert told["looks"] > 50
    assert told["used"] < 20e6, told
    assert told["spilled"] == 0


def test_rows_wait_for_a_slow_output(
    cluster: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, rows_per_shard, rows_per_microbatch = 320, 2, 4
    commit, under_way = Ledger.commit, []

    def slow_commit(self: Ledger, *arguments: Any, **options: Any) -> PartInfo:
        time.sleep(0.05)
        return commit(self, *arguments, **options)

    class Watched(Captioner):
        def _note_commits(self) -> None:
            super()._note_commits()
            under_way.append(len(self._writer.under_way))

    monkeypatch.setattr(Ledger, "commit", slow_commit)
    source = write_pictures(tmp_path / "pictures.parquet", rows, bad=False)
    layout = {"rows_per_shard": rows_per_shard, "rows_per_microbatch": rows_per_microbatch, "max_new_tokens": 2}
    summary = Watched(make_config(model, source, tmp_path / "out", **layout)).run()
    assert summary.ok == rows
    assert [row["id"] for row in rows_of(tmp_path / "out")] == list(range(1000, 1000 + rows))
    assert max(under_way) >= PARTS_AHEAD, "the output was the slowest"
    # Rows that were admitted before it was full come out all the same: a chunk and what the stages hold.
    assert max(under_way) <= PARTS_AHEAD + 24


def test_a_fast_replica_takes_more(cluster: None, model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "slow"

    class OneIsSlow(StageActor):
        def __init__(self) -> None:
            super().__init__()
            with suppress(FileExistsError):
                mark.mkdir()
                self._seconds = 0.4

        _seconds = 0.0

        def step(self, *arguments: Any) -> Any:
            time.sleep(self._seconds)
            return super().step(*arguments)

    rows = 600
    source = write_pictures(tmp_path / "pictures.parquet", rows, bad=False)
    config = make_config(model, source, tmp_path / "out", replicas=2, rows_per_microbatch=16, max_new_tokens=4)
    captioner = Captioner(config, stage_actor=ray.remote(**ACTOR_OPTIONS)(OneIsSlow))
    assert captioner.run().ok == rows
    slow, fast = sorted(replica.rows for replica in captioner._replicas)
    assert slow + fast == rows
    assert slow > 0
    assert fast > 2 * slow
