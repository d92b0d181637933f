"""`growth()`: which nodes the cluster's autoscaler is adding, as Ray's control service knows it.

Ray publishes what its autoscaler does, not which kinds of nodes it may add. A cluster without an autoscaler, and one
whose Ray says nothing of it, is adding nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.worker import global_worker
from ray.core.generated import autoscaler_pb2

from ray_ministral.driver.cluster import NODE_TYPE_LABEL

ASK_TIMEOUT_S = 5


@dataclass(frozen=True)
class Growth:
    """coming: how many nodes of each type are on their way. failed: why the last start of a type has failed.

    is_infeasible: the autoscaler says that none of its types, or no more of them, can bring what somebody waits for.
    """

    coming: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    is_infeasible: bool = False

    @property
    def is_coming(self) -> bool:
        """Whether a node is on its way."""
        return bool(self.coming)

    def __str__(self) -> str:
        """The rest of a sentence on what the cluster has; empty where there is nothing to say."""
        said = []
        if self.coming:
            nodes = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.coming.items()))
            said.append(f"its autoscaler is adding {nodes}")
        said += [f"it could not start {kind}: {reason}" for kind, reason in sorted(self.failed.items())]
        if self.is_infeasible and not self.coming:
            said.append(
                "its autoscaler has nothing to add for all that jobs wait for: look at the resources and max_workers "
                "of its node types, and at `ray status`"
            )
        return "".join(f"; {part}" for part in said)


def growth() -> Growth:
    """What the autoscaler of the connected cluster does now."""
    messages: Any = autoscaler_pb2  # made when it is imported: no type checker sees into it
    worker: Any = global_worker
    reply = messages.GetClusterStatusReply()
    with suppress(Exception):  # only for messages and patience; who waits has a deadline without it
        reply.ParseFromString(worker.gcs_client.get_cluster_status(timeout_s=ASK_TIMEOUT_S))
    heads = [node for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
    return growth_of(reply.autoscaling_state, {node["Labels"].get(NODE_TYPE_LABEL, "") for node in heads})


def growth_of(state: Any, head_types: Collection[str] = ()) -> Growth:
    """The same of Ray's `AutoscalingState`.

    For some seconds after the start of a cluster its head is on its way, too; nobody waits for another one.
    """
    coming: Counter[str] = Counter()
    for request in state.pending_instance_requests:
        coming[request.ray_node_type_name] += request.count
    for instance in state.pending_instances:
        coming[instance.ray_node_type_name] += 1
    for kind in head_types:
        coming.pop(kind, None)
    failed = {request.ray_node_type_name: request.reason for request in state.failed_instance_requests}
    infeasible = bool(state.infeasible_gang_resource_requests or state.infeasible_resource_requests)
    return Growth(dict(coming), failed, infeasible)
