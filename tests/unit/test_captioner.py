"""What of `Captioner` needs no cluster: the keys of a row's random numbers, and its clock."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ray_ministral.data.shards import Shard
from ray_ministral.driver.captioner import sample_key
from ray_ministral.driver.clock import Clock

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
