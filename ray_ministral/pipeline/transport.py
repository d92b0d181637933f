"""How an activation or a gradient gets from one stage to another, point to point.

`GroupTransport` uses a torch.distributed process group of one pipeline and one generation: gloo on CPU, NCCL on GPUs.
Shapes are known from the plan and never exchanged. A peer that dies or hangs is an error after the group's time-out.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore


class Transport(Protocol):
    """Messages between a stage and its peers; a pair of stages matches messages by `tag` and order."""

    def send(self, tensor: Tensor, to_stage: int, tag: int) -> None:
        """Start sending; the tensor must not change until `flush`."""
        ...

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, from_stage: int, tag: int) -> Tensor:
        """Wait for a message."""
        ...

    def flush(self) -> None:
        """Wait until everything that was sent has left."""
        ...


class GroupTransport:
    """Point to point in a process group whose rank is the number of the stage."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._sending: list[tuple[Any, Tensor]] = []

    @classmethod
    def join(
        cls, *, host: str, port: int, generation: int, stage: int, num_stages: int, device: torch.device, timeout_s: float
    ) -> GroupTransport:
        """Meet the other stages of this generation at the store on `host` (stage 0 serves it) and make the group."""
        timeout = timedelta(seconds=timeout_s)
        server = TCPStore(host, port, num_stages, is_master=stage == 0, timeout=timeout, wait_for_workers=False)
        store = PrefixStore(f"generation-{generation}", server)
        if device.type == "cuda":
            from torch.distributed import ProcessGroupNCCL

            options = ProcessGroupNCCL.Options()
            options._timeout = timeout
            group: Any = ProcessGroupNCCL(store, stage, num_stages, options)
        else:
            from torch.distributed import ProcessGroupGloo

            group = ProcessGroupGloo(store, stage, num_stages, timeout)
        transport = cls(group, device)
        transport._store = server  # type: ignore[attr-defined]  # it must live as long as the group
        return transport

    def send(self, tensor: Tensor, to_stage: int, tag: int) -> None:
        """See `Transport`. The work object is kept: gloo silently loses a message whose work is dropped."""
        tensor = tensor.detach().contiguous()
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        self._sending.append((self._group.send([tensor], to_stage, tag), tensor))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, from_stage: int, tag: int) -> Tensor:
        """See `Transport`."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        self._group.recv([tensor], from_stage, tag).wait()
        return tensor

    def flush(self) -> None:
        """See `Transport`."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
