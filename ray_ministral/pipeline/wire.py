"""Activations on the wire as numpy arrays: a torch tensor serialises many times slower than a view of its memory.

numpy has no bfloat16, so a bf16 tensor travels as its int16 view; the receiver knows the dtype of its model.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor


def to_wire(tensor: Tensor) -> np.ndarray:
    """A numpy view (a copy where the tensor is on a device or not contiguous)."""
    host = tensor.detach().to("cpu").contiguous()
    return (host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy()


def from_wire(array: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor that `to_wire` was given. Arrays out of an object store are read-only: never write into the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks that it cannot protect a read-only array
        tensor = torch.from_numpy(array)
    if dtype == torch.bfloat16 and tensor.dtype == torch.int16:
        tensor = tensor.view(torch.bfloat16)
    if tensor.dtype != dtype:
        raise TypeError(f"got activations of {tensor.dtype}, wanted {dtype}: all stages must run with one --dtype")
    return tensor.to(device)
