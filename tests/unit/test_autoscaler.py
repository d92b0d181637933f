"""What is said of an autoscaler, from Ray's own messages; a real one is in `tests/cluster/test_autoscaler.py`."""

from __future__ import annotations

from typing import Any

from ray.core.generated import autoscaler_pb2

from ray_ministral.driver.autoscaler import growth_of


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
