"""cluster.yaml against Ray's own schema and checks, and the promises that a schema cannot hold."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]


def load() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def check(config: dict[str, Any]) -> dict[str, Any]:
    """Ray's schema, then what `ray up` does to a config before it talks to the cloud."""
    jsonschema.validate(config, json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text()))
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def test_ray_accepts_it_as_it_stands_and_as_it_prepares_it() -> None:
    prepared = check(load())
    assert set(prepared["available_node_types"]) == set(load()["available_node_types"])


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    config = load()
    change(config)
    return config


@pytest.mark.parametrize(
    "config",
    [
        broken(lambda c: c.update(idle_timeout="ten")),
        broken(lambda c: c.update(max_workers="many")),
        broken(lambda c: c["provider"].pop("type")),
        broken(lambda c: c.update(head_node_type="nobody")),
        broken(lambda c: c["available_node_types"]["head"].pop("node_config")),
        broken(lambda c: c["available_node_types"]["gpu_a10g"]["resources"].update(GPU=0.5)),
        broken(lambda c: c["available_node_types"]["gpu_a10g"].update(min_workers=99)),
        broken(lambda c: c.update(setup_commands="pip install ray")),
    ],
)
def test_a_broken_one_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        check(config)


def test_the_head_computes_nothing_and_the_workers_come_and_go() -> None:
    config = check(load())
    assert "GPU" not in config["available_node_types"][config["head_node_type"]]["resources"]
    assert config["idle_timeout_minutes"] > 0
    assert workers(config)
    for name, kind in workers(config).items():
        assert kind["resources"]["GPU"] >= 1, name
        assert 0 <= kind["min_workers"] < kind["max_workers"] <= config["max_workers"], name


def test_every_node_starts_with_token_authentication_and_a_private_dashboard() -> None:
    config = check(load())
    starts = {
        which: [command for command in config[f"{which}_start_ray_commands"] if "ray start" in command]
        for which in ("head", "worker")
    }
    for which, commands in starts.items():
        assert len(commands) == 1, which
        # In front of the program: an assignment after it would be an argument.
        environment = commands[0].split("ray start")[0].split()
        assert "RAY_AUTH_MODE=token" in environment, which
    assert "--dashboard-host=127.0.0.1" in starts["head"][0].split()
    assert "--address=$RAY_HEAD_IP:6379" in starts["worker"][0].split()
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"].endswith("auth_token")
    text = (ROOT / "cluster.yaml").read_text()
    assert "0.0.0.0" not in text
    assert "RAY_AUTH_TOKEN=" not in text, "a token does not belong into a file"


def test_what_the_nodes_install_is_mounted_and_locked() -> None:
    config = load()
    mounts = config["file_mounts"]
    home = "/home/ubuntu/ray_ministral"
    local = {remote.removeprefix(home + "/"): here for remote, here in mounts.items() if remote.startswith(home)}
    for remote, here in local.items():
        assert remote == here
        assert (ROOT / here).exists(), here
    # Everything that the build reads is there.
    assert {"pyproject.toml", "README.md", "LICENSE", "ray_ministral", "constraints.txt"} <= set(local)
    install = next(command for command in config["setup_commands"] if command.endswith("~/ray_ministral"))
    assert "--constraints ~/ray_ministral/constraints.txt" in install
    # All nodes need the very same Ray and Python.
    locked = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in "#"]
    (ray_itself,) = [requirement for requirement in locked if requirement.name == "ray"]
    assert [specifier.operator for specifier in ray_itself.specifier] == ["=="]
    assert any("--python 3.11" in command for command in config["setup_commands"])
