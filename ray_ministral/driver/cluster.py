"""Joining a Ray cluster or starting a local one, and what it offers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import ray

from ray_ministral.config import PipelineConfig
from ray_ministral.errors import ClusterError, ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolved:
    """What "auto" came to on this cluster: device and dtype of the stages, threads (and CPUs) of each."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    threads: int

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one stage, as a placement group wants them."""
        return {"CPU": float(self.threads)} | ({"GPU": 1.0} if self.device == "cuda" else {})


@contextmanager
def connected(address: str, pipeline: PipelineConfig) -> Iterator[None]:
    """Join the cluster at `address`, or start one on this machine, for as long as the context lasts.

    auto: the cluster that RAY_ADDRESS names or that runs on this machine, else a local one. local: always a new one,
    bound to the loopback interface. Anything else is an address. A cluster that the caller has joined is used and left
    as it is. Raises `ClusterError` where the cluster does not answer.
    """
    if ray.is_initialized():
        yield
        return
    try:
        if address == "local" or (address == "auto" and not _cluster_is_running()):
            logger.info("starting a local Ray cluster for this job")
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, pipeline.stages * pipeline.replicas * (pipeline.threads_per_stage or 1)),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                configure_logging=True,
                logging_level="warning",
                log_to_driver=False,
            )
        else:
            logger.info("joining the Ray cluster at %s", os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
            ray.init(address=address, logging_level="warning", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"no Ray cluster at --address {address}: {error}. Start one with `ray start --head`, or use --address local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _cluster_is_running() -> bool:
    if os.environ.get("RAY_ADDRESS"):
        return True
    from ray._private.services import find_gcs_addresses

    return bool(find_gcs_addresses())


def resolve(pipeline: PipelineConfig) -> Resolved:
    """Replace every "auto" by what the connected cluster offers. Raises `ConfigError` for a device that it lacks."""
    resources = ray.cluster_resources()
    stages = pipeline.stages * pipeline.replicas
    gpus = int(resources.get("GPU", 0))
    device: Literal["cpu", "cuda"]
    if pipeline.device == "auto":
        device = "cuda" if gpus >= stages else "cpu"
    else:
        device = pipeline.device
        if device == "cuda" and gpus == 0:
            raise ConfigError("--device cuda: the cluster has no GPU; use --device cpu, or join a node with GPUs")
    dtype: Literal["float32", "bfloat16"]
    if pipeline.dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    else:
        dtype = pipeline.dtype
    threads = pipeline.threads_per_stage
    if threads is None:
        threads = 1 if device == "cuda" else max(1, int(resources.get("CPU", 1)) // stages)
    return Resolved(device, dtype, threads)
