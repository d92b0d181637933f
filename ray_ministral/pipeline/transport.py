"""How an activation or a gradient gets from one stage to another, point to point.

`GroupTransport` uses a torch.distributed process group of one pipeline and one generation: gloo on CPU, NCCL on GPUs.
Shapes are known from the plan and never exchanged. A peer that dies is an error at once, one that hangs after the
group's time-out.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # its stubs do not export them


class Transport(Protocol):
    """Messages between a stage and its peers; a pair of stages matches messages by `tag` and order."""

    def send(self, tensor: Tensor, to_stage: int, tag: int) -> None:
        """Start sending; the tensor must not change until `flush`."""
        ...

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, from_stage: int, tag: int) -> Callable[[], Tensor]:
        """Ask for a message, perhaps ahead of need; what is returned waits for it and gives it."""
        ...

    def flush(self) -> None:
        """Wait until everything that was sent has left."""
        ...


class Twins(Protocol):
    """The same stage of all replicas."""

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the replicas; every replica gets the same bits."""
        ...


class GroupTwins:
    """All-reduce in a process group whose rank is the number of the replica."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def add_up(self, tensor: Tensor) -> None:
        """See `Twins`."""
        self._group.allreduce([tensor]).wait()


class GroupTransport:
    """Point to point in process groups whose rank is the number of the stage.

    `down` carries what goes to later stages, `up` what goes to earlier ones. Gloo matches messages by their tags, so
    one group can be both. NCCL has no tags and a stream for each pair of ranks, in which a send waits until its receive
    is reached and everything behind it waits, too: two stages that each send before they receive would stand still for
    ever. A group for each direction has only sends at one end and only receives at the other, in one order, which
    `schedule_check` proves.
    """

    def __init__(self, down: Any, up: Any, stage: int, device: torch.device) -> None:
        self._down, self._up, self._stage = down, up, stage
        self._device = device
        self._sending: list[tuple[Any, Tensor]] = []

    def send(self, tensor: Tensor, to_stage: int, tag: int) -> None:
        """See `Transport`. The work object is kept: gloo silently loses a message whose work is dropped."""
        tensor = tensor.detach().contiguous()
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        self._sending.append((self._group(self._stage, to_stage).send([tensor], to_stage, tag), tensor))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, from_stage: int, tag: int) -> Callable[[], Tensor]:
        """See `Transport`."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        work = self._group(from_stage, self._stage).recv([tensor], from_stage, tag)

        def wait() -> Tensor:
            work.wait()
            return tensor

        return wait

    def _group(self, sender: int, receiver: int) -> Any:
        return self._down if sender < receiver else self._up

    def flush(self) -> None:
        """See `Transport`."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()


def serve_store(host: str, timeout_s: float) -> TCPStore:
    """The store at which the processes of a pipeline meet, listening on `host` alone; its port is `.port`."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    # The store takes the socket over, so that it never listens on any other interface.
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )


def join_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """A client of the store that another process serves."""
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def make_group(
    store: Any, name: str, rank: int, size: int, *, device: torch.device, host: str, timeout_s: float
) -> Any:
    """A process group of its own, apart from torch's default group: NCCL for GPUs, else gloo bound to this `host`.

    `name` has to be new for each group, so it has the generation in it.
    """
    prefixed = PrefixStore(name, store)
    if device.type == "cuda":
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        return ProcessGroupNCCL(prefixed, rank, size, options)
    from torch.distributed import ProcessGroupGloo

    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_s)
    return gloo(prefixed, rank, size, options)
