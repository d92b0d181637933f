"""What the cluster tests share: a local Ray cluster, a copy of the small model, input files with all kinds of rows."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from ray_ministral.config import PipelineConfig
from ray_ministral.driver.cluster import connected
from tests.cluster.inputs import write_albums, write_pictures
from tests.cluster.processes import wait_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: the one in examples/ may be made anew while the tests run."""
    folder = tmp_path_factory.mktemp("model") / "small"
    shutil.copytree(ROOT / "examples" / "model", folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of one picture a row in two row groups; see `write_pictures`."""
    return write_pictures(tmp_path_factory.mktemp("input") / "pictures.parquet")


@pytest.fixture(scope="session")
def albums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a list of pictures and a question a row; see `write_albums`."""
    return write_albums(tmp_path_factory.mktemp("input") / "albums.parquet")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local cluster of this process with six CPUs, in a folder of its own with a short name (for its sockets)."""
    folder = Path(tempfile.mkdtemp(prefix="rm", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        # Workers import the package and the tests' own actor classes from here.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
        patch.setenv("RAY_TMPDIR", str(folder))
        # A token of its own: nothing is read from or left in the home directory. (The mode was read on import of Ray.)
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.delenv("RAY_ADDRESS", raising=False)
        try:
            with connected("local", PipelineConfig(stages=6)):
                yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def clean_cluster(cluster: None) -> Iterator[None]:
    """The shared cluster; after the test no actor and no placement group is left, and all CPUs are free."""
    yield
    wait_for(lambda: not leftovers(), 60, lambda: f"left on the cluster: {leftovers()}")


def leftovers() -> list[str]:
    """Actors and placement groups that are alive on the cluster that this process is connected to, and taken CPUs."""
    found = [f"actor {actor}" for actor in ray.util.list_named_actors()]
    table = ray.util.placement_group_table()
    found += [f"placement group {key}" for key, group in table.items() if group["state"] != "REMOVED"]
    states = ray._private.state.actors().values()
    found += [f"actor {state['ActorID']} {state['State']}" for state in states if state["State"] != "DEAD"]
    free, has = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
    return found + ([f"{has - free:g} CPUs"] if free != has else [])
