"""What is said of an autoscaler, from Ray's own messages; a real one is in `tests/cluster/test_autoscaler.py`."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import ray
from ray.core.generated import autoscaler_pb2

from ray_ministral.config import PipelineConfig
from ray_ministral.driver.autoscaler import growth_of
from ray_ministral.driver.cluster import NODE_TYPE_LABEL, resolve
from ray_ministral.errors import ConfigError


def state(**fields: Any) -> Any:
    return autoscaler_pb2.AutoscalingState(**fields)


def test_an_autoscaler_that_does_nothing_is_not_mentioned() -> None:
    growing = growth_of(state())
    assert not growing.is_coming
    assert str(growing) == ""


def test_nodes_on_their_way_are_counted_by_type() -> None:
    growing = growth_of(
        state(
            pending_instance_requests=[
                autoscaler_pb2.PendingInstanceRequest(ray_node_type_name="gpu", count=2),
                autoscaler_pb2.PendingInstanceRequest(ray_node_type_name="head", count=1),
            ],
            pending_instances=[
                autoscaler_pb2.PendingInstance(ray_node_type_name="gpu"),
                autoscaler_pb2.PendingInstance(ray_node_type_name="big"),
            ],
            # While something comes, what does not fit yet is no news.
            infeasible_gang_resource_requests=[autoscaler_pb2.GangResourceRequest()],
        ),
        {"head", ""},
    )
    assert growing.is_coming
    assert str(growing) == "; its autoscaler is adding 1 x big, 3 x gpu"


def test_a_head_on_its_way_is_nothing_to_wait_for() -> None:
    pending = [autoscaler_pb2.PendingInstance(ray_node_type_name="head")]
    assert not growth_of(state(pending_instances=pending), {"head"}).is_coming


def test_failed_starts_are_said_with_their_reason() -> None:
    failed = autoscaler_pb2.FailedInstanceRequest(ray_node_type_name="gpu", count=1, reason="no capacity in zone a")
    growing = growth_of(state(failed_instance_requests=[failed]))
    assert not growing.is_coming
    assert str(growing) == "; it could not start gpu: no capacity in zone a"


def test_what_no_node_type_can_bring_is_said() -> None:
    growing = growth_of(state(infeasible_gang_resource_requests=[autoscaler_pb2.GangResourceRequest()]))
    assert not growing.is_coming
    assert "nothing to add" in str(growing)
    assert "max_workers" in str(growing)


def nodes(*resources: dict[str, float], kind: str | None = None) -> list[dict[str, Any]]:
    labels = {} if kind is None else {NODE_TYPE_LABEL: kind}
    return [{"Alive": True, "Resources": each, "Labels": labels} for each in resources]


@pytest.mark.parametrize(
    ("cluster", "device", "expected"),
    [
        (nodes({"CPU": 8}, kind="head"), "auto", "cpu"),
        (nodes({"CPU": 8}, kind="head"), "cuda", "cuda"),  # the autoscaler may add them
        (nodes({"CPU": 8}, {"CPU": 8, "GPU": 2}), "auto", "cuda"),
        (nodes({"CPU": 8}, {"CPU": 8, "GPU": 1}), "auto", "cpu"),
        (nodes({"CPU": 8}, {"CPU": 8, "GPU": 1}), "cuda", "cuda"),
    ],
)
def test_the_device_that_auto_comes_to(
    cluster: list[dict[str, Any]], device: Literal["auto", "cuda"], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: cluster)
    assert resolve(PipelineConfig(stages=2, device=device)).device == expected


def test_a_cluster_that_does_not_grow_must_have_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes({"CPU": 8}))
    with pytest.raises(ConfigError, match="--device cuda: the cluster has no GPU"):
        resolve(PipelineConfig(device="cuda"))


def test_the_cpu_of_a_cluster_that_grows_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes({"CPU": 8}, kind="head"))
    resolve(PipelineConfig(stages=4))
    assert "the cluster has 0 GPUs now, the stages need 4" in caplog.text
    caplog.clear()
    resolve(PipelineConfig(stages=4, device="cpu"))
    assert not caplog.text


def test_a_stage_gets_the_threads_that_one_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"Alive": False, "Resources": {"CPU": 64}, "Labels": {}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes({"CPU": 2}, {"CPU": 2}, {"CPU": 2}), gone])
    assert resolve(PipelineConfig(stages=2)).threads == 2
