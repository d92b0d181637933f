"""`PipelineStage`: a model chunk and what runs it. Knows nothing of Ray; an actor is a thin skin around one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ray_ministral.config import StageOptions
from ray_ministral.errors import ConfigError
from ray_ministral.model.packed import PackedBatch
from ray_ministral.model.weights import load_chunk

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PipelineStage:
    """Holds one chunk and runs packed batches through it."""

    def __init__(self, options: StageOptions) -> None:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device 'cuda' was asked for, torch sees no GPU in this process: use --device cpu")
        torch.set_num_threads(options.threads)
        self.options = options
        self.spec = options.spec
        self.device = torch.device(options.device)
        self.dtype = DTYPES[options.dtype]
        self._model: Any = None
        self._parameter_bytes = 0

    @property
    def model(self) -> Any:
        """The chunk; `load` or `use` comes first."""
        assert self._model is not None, "load() or use() before anything else"
        return self._model

    def load(self, on_progress: Callable[[int, int], None] | None = None) -> float:
        """Read the chunk's own weights, and lay them out for this device; returns the seconds it took."""
        started = time.perf_counter()
        self._model = load_chunk(
            self.options.model_dir, self.spec, dtype=self.dtype, device=self.device, on_progress=on_progress
        )
        self._model.requires_grad_(False)
        self._model.eval()
        self._parameter_bytes = sum(parameter.nbytes for parameter in self._model.parameters())
        self._model.pack()
        return time.perf_counter() - started

    def use(self, model: Any) -> None:
        """Run a chunk that somebody else has loaded, and trains, perhaps; instead of `load`."""
        self._model = model

    def run(self, batch: PackedBatch, hidden: Tensor | None) -> Tensor:
        """One forward pass without gradients: hidden states `[T, 1, H]`, or logits `[rows, V]` on the last stage."""
        with torch.inference_mode():
            if hidden is not None:
                self.model.set_input_tensor(hidden)
            output: Tensor = self.model(packed=batch)
        return output

    def memory(self) -> dict[str, int]:
        """Bytes: `parameters` of the chunk as loaded, `peak_rss` and `rss` of the process."""
        return {"parameters": self._parameter_bytes, **process_memory()}


def process_memory() -> dict[str, int]:
    """`peak_rss` and `rss` of this process in bytes, from /proc (0 where there is none)."""
    keys = {"VmHWM": "peak_rss", "VmRSS": "rss"}
    found = dict.fromkeys(keys.values(), 0)
    path = f"/proc/{os.getpid()}/status"
    if os.path.exists(path):
        with open(path, encoding="ascii") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key in keys:
                    found[keys[key]] = int(value.split()[0]) * 1024
    return found
