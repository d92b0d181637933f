"""Pixels travel as bytes; here they become what the vision tower takes, by a table look-up on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class PixelTable:
    """`table` float32 `[3, 256]`: what the model's image processor makes of each byte of each channel."""

    def __init__(self, table: np.ndarray, dtype: torch.dtype, device: torch.device) -> None:
        self._table_3x256 = torch.from_numpy(table).to(device, dtype)

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """uint8 `[3, H, W]` to the table's dtype, same shape."""
        table = self._table_3x256
        index_3HW = torch.from_numpy(np.array(pixels)).to(table.device, torch.int64)
        return torch.stack([table[channel][index_3HW[channel]] for channel in range(3)])
