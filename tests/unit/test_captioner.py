"""What of `Captioner` needs no cluster: a job of which only the end is missing, the keys of rows, the clock."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_ministral.captioning.request import OK, RowResult
from ray_ministral.config import CaptionConfig
from ray_ministral.data.parts import write_part
from ray_ministral.data.shards import Shard
from ray_ministral.driver.captioner import Captioner
from ray_ministral.driver.clock import Clock
from ray_ministral.driver.job import CaptionJob
from ray_ministral.driver.replica import sample_key

MODEL = Path(__file__).resolve().parents[2] / "examples" / "model"
PLACE = Shard(index=3, file="a.parquet", file_index=1, row_group=2, start=10, stop=20, location="/data/a.parquet")


def test_a_rows_key_follows_from_its_place_alone() -> None:
    key = sample_key(PLACE, 12)
    # Another cut into shards, other files besides, another place of the folder.
    moved = replace(PLACE, index=0, file_index=7, start=12, stop=13, location="s3://bucket/a.parquet")
    assert sample_key(moved, 12) == key
    others = [
        sample_key(PLACE, 13),
        *(sample_key(replace(PLACE, **other), 12) for other in ({"row_group": 1}, {"file": "b"})),
    ]
    assert len({key, *others}) == 4
    # Written down, so that a resume under a later version samples the same.
    assert key == 12723624334251738232


def test_keys_fill_all_64_bits() -> None:
    keys = np.array([sample_key(PLACE, row) for row in range(2000)], dtype=np.uint64)
    assert len(set(keys.tolist())) == 2000
    set_bits = [(keys >> np.uint64(bit) & np.uint64(1)).mean() for bit in range(64)]
    assert all(0.4 < share < 0.6 for share in set_bits)


def test_the_laps_of_the_clock_add_up_to_the_start() -> None:
    clock = Clock()
    assert clock.working_seconds == 0
    clock.lap("plan")
    clock.lap("stages", imports=1.5)
    clock.first_admission()
    started = clock.startup_seconds
    clock.first_admission()
    clock.last_commit()
    assert clock.startup_seconds == started, "later admissions change nothing"
    laps = sum(seconds for name, seconds in clock.laps.items() if ":" not in name)
    assert abs(laps - started) < 0.01
    assert clock.laps["stages: imports"] == 1.5
    assert 0 <= clock.working_seconds <= clock.seconds - started


def result(row: int) -> RowResult:
    return RowResult(row, f"caption {row}", OK, None, None, "stop", 9, 4, 3, 1, None)


def test_a_job_of_which_only_the_end_is_missing_needs_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that died after the last part, and before `_SUCCESS`."""

    def no_cluster(*_: object) -> None:
        raise AssertionError("a cluster is started for nothing")

    monkeypatch.setattr("ray_ministral.driver.captioner.connected", no_cluster)
    source, output = tmp_path / "in.parquet", tmp_path / "out"
    pq.write_table(pa.table({"image": pa.array([b"x", b"y", b"z"]), "id": [1, 2, 3]}), source)
    config = CaptionConfig(model=str(MODEL), inputs=(str(source),), output=str(output), rows_per_shard=2)
    job = CaptionJob.plan_job(config)
    first, last = job.plan.shards

    def write(shard: Shard) -> None:
        results = [result(row) for row in range(shard.start, shard.stop)]
        carried = job.plan.carried_columns
        attempt = write_part(shard, results, output=job.ledger.output, carried_columns=carried, with_token_ids=False)
        job.ledger.commit(attempt, generation=0)

    write(first)
    job.ledger.close()
    with pytest.raises(AssertionError, match="for nothing"):
        Captioner(config).run()
    assert not (output / "_SUCCESS").exists()

    job = CaptionJob.plan_job(config)
    write(last)
    job.ledger.close()
    summary = Captioner(config).run()
    assert (summary.rows, summary.ok, summary.errors) == (3, 3, 0)
    assert (output / "_SUCCESS").exists()
    assert json.loads((output / "summary.json").read_text())["ok"] == 3
    table = pa.concat_tables([pq.read_table(part) for part in sorted(output.glob("part-*"))])
    assert table["caption"].to_pylist() == ["caption 0", "caption 1", "caption 2"]
