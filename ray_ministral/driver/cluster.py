"""Joining a Ray cluster or starting a local one, and what it offers."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray._private import ray_constants

from ray_ministral.config import PipelineConfig
from ray_ministral.driver.head_watch import HeadWatch
from ray_ministral.driver.policies import threads_for
from ray_ministral.errors import ClusterError, ConfigError

logger = logging.getLogger(__name__)

IDLE_WORKER_MS = 3_600_000
"""A worker of a local cluster is kept when it is idle. Ray's second is less than the time between two parts: each one's
writer would be a new process, and to start one and to end one takes a core a second, which a stage then lacks."""

CONNECT_TIMEOUT_S = 15.0

NODE_TYPE_LABEL = "ray.io/node-group"


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
    as it is. Raises `ClusterError` where the cluster does not answer; `HeadWatch` says what happens if its head dies.
    """
    # Of one death there are many errors, and Ray prints all that nobody asks for, pages of them: we say it once.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if ray.is_initialized():
        yield
        return
    try:
        with _our_sigterm_handler():
            _join_or_start(address, pipeline)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"no Ray cluster at --address {address}: {error}. Start one with `ray start --head`, or use --address local"
        ) from error
    try:
        with HeadWatch(ray.get_runtime_context().gcs_address):
            yield
    finally:
        ray.shutdown()


def _join_or_start(address: str, pipeline: PipelineConfig) -> None:
    if address == "local" or (address == "auto" and not _cluster_is_running()):
        _start_local(pipeline)
    else:
        place = (os.environ.get("RAY_ADDRESS") or address) if address == "auto" else address
        logger.info("joining the Ray cluster at %s", place)
        _check_that_someone_listens(place)
        ray.init(address=address, runtime_env=_runtime_env(), logging_level=logging.WARNING, log_to_driver=False)


def _runtime_env() -> dict[str, Any] | None:
    """This package for the workers of a cluster that we join, in the version that the driver has.

    `ray job submit` has sent its working directory there already, and a job has one runtime environment.
    """
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return None
    return {"py_modules": [str(Path(__file__).resolve().parents[1])]}


def _check_that_someone_listens(address: str) -> None:
    """Ray itself tries for many minutes. Raises ConnectionError; leaves what is not HOST:PORT to Ray."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(f"nobody answers there ({error})") from error


@contextmanager
def _our_sigterm_handler() -> Iterator[None]:
    """Keep the caller's SIGTERM handler over `ray.init`, which puts one of its own in place.

    Ray's ends a local cluster's processes under us, while we still have actors to take away, and leaves with status 1
    or an abort. A SIGTERM during `ray.init` itself is passed on as KeyboardInterrupt.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _start_local(pipeline: PipelineConfig) -> None:
    """A cluster of this process alone. It says that it has as many CPUs as the stages ask for, even on fewer cores.

    Unless RAY_AUTH_MODE says otherwise Ray guards it with the token of ~/.ray/auth_token, which it makes, readable by
    everyone, where there is none.
    """
    logger.info("starting a local Ray cluster for this job")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it recommends to switch the token off
    token = Path.home() / ".ray" / "auth_token"
    had_token = token.exists()
    asked = (pipeline.stages * pipeline.replicas + pipeline.spares) * (pipeline.threads_per_stage or 1)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _loopback_only():
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, asked),
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,
            _system_config={"idle_worker_killing_time_threshold_ms": IDLE_WORKER_MS},
        )
    if not had_token and token.exists():
        token.chmod(0o600)


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Have a cluster that starts now listen on the loopback interface alone.

    On Linux Ray turns even an explicit 127.0.0.1 into the machine's address, and listens everywhere; where it takes
    clusters for unsupported (Windows, macOS) it stays on the loopback interface. This is that switch.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _cluster_is_running() -> bool:
    if os.environ.get("RAY_ADDRESS"):
        return True
    from ray._private.services import find_gcs_addresses

    return bool(find_gcs_addresses())


def alive_nodes() -> set[str]:
    """The ids of the nodes that the connected cluster has now."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def resolve(pipeline: PipelineConfig) -> Resolved:
    """Replace every "auto" by what the connected cluster offers now. Raises `ConfigError` for a device that it lacks.

    A cluster that grows by itself may get GPUs that it does not have yet: there `--device cuda` is taken at its word.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    # The cluster launcher and KubeRay, which bring the autoscaler, give nodes a type.
    grows = any(NODE_TYPE_LABEL in node["Labels"] for node in nodes)
    stages = pipeline.stages * pipeline.replicas
    gpus = sum(int(node["Resources"].get("GPU", 0)) for node in nodes)
    device: Literal["cpu", "cuda"]
    if pipeline.device == "auto":
        device = "cuda" if gpus >= stages else "cpu"
        if device == "cpu" and grows:
            logger.warning(
                "--device auto: the cluster has %d GPUs now, the stages need %d, so they run on CPU; with --device "
                "cuda they wait until the autoscaler has added GPUs",
                gpus,
                stages,
            )
    else:
        device = pipeline.device
        if device == "cuda" and gpus == 0 and not grows:
            raise ConfigError("--device cuda: the cluster has no GPU; use --device cpu, or join a node with GPUs")
    dtype: Literal["float32", "bfloat16"]
    dtype = ("bfloat16" if device == "cuda" else "float32") if pipeline.dtype == "auto" else pipeline.dtype
    threads = pipeline.threads_per_stage
    if threads is None:
        cpus = [float(node["Resources"].get("CPU", 0)) for node in nodes]
        threads = 1 if device == "cuda" else threads_for(stages, cpus)
    return Resolved(device, dtype, threads)
