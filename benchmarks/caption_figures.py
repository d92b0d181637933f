"""What the captioning benchmark says beside seconds: FLOPs, the wall, whether ids agree, how a long job goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from ray_ministral.model.architecture import Architecture

MATRIX_ROWS, MATRIX_SECONDS = 512, 2.0
TIE = 1e-3
"""Logits so close are a tie: fp32 sums in another order can take either. Random models make them a few units apart."""


def flops_per_image(arch: Architecture, rows: Sequence[tuple[int, int, int]]) -> float:
    """Mean FLOPs of a row; rows are (patches, prompt tokens, new tokens). Two for each parameter and token.

    The last new token is never fed; the output layer is for new tokens alone. Attention is causal: half of the square.
    """
    found = []
    for patches, prompt, new in rows:
        fed = prompt + new - 1
        vision = arch.vision
        tower = 2.0 * arch.vision_parameters * patches + 4.0 * patches**2 * vision.hidden_size * vision.num_layers
        layers = 2.0 * arch.layer_parameters * fed + 2.0 * fed**2 * arch.num_heads * arch.head_dim
        found.append(tower + layers * arch.num_layers + 2.0 * arch.embedding_parameters * new)
    return mean(found)


def matrix_rate(hidden: int, columns: int) -> float:
    """FLOP/s of all cores together: `linear` of 512 rows, one process of one thread a core, all at once."""
    context = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    barrier, rates = context.Barrier(cores), context.SimpleQueue()
    workers = [context.Process(target=_multiply, args=(hidden, columns, barrier, rates)) for _ in range(cores)]
    for worker in workers:
        worker.start()
    found = [rates.get() for _ in workers]
    for worker in workers:
        worker.join()
    return float(sum(found))


def _multiply(hidden: int, columns: int, barrier: Any, rates: Any) -> None:
    import torch
    from torch.nn.functional import linear

    torch.set_num_threads(1)
    x, weight = torch.randn(MATRIX_ROWS, hidden), torch.randn(columns, hidden)
    with torch.inference_mode():
        for _ in range(20):
            linear(x, weight)
        barrier.wait()
        started, products = time.perf_counter(), 0
        while (seconds := time.perf_counter() - started) < MATRIX_SECONDS:
            linear(x, weight)
            products += 1
    rates.put(2.0 * MATRIX_ROWS * hidden * columns * products / seconds)


@dataclass(frozen=True)
class Agreement:
    """Of `rows` rows, `equal` have the ids of the first contestant; the others part at a token, `gap` at most apart.

    `gap` None: nothing differs; infinite: a caption has another length.
    """

    rows: int
    equal: int
    gap: float | None

    @property
    def holds(self) -> bool:
        """Whether nothing but ties differs."""
        return self.gap is None or self.gap <= TIE

    def __str__(self) -> str:
        if self.gap is None:
            return f"{self.equal} of {self.rows}"
        return f"{self.equal} of {self.rows}, {'ties' if self.holds else 'NO TIES'} (gap {self.gap:.1e})"


def partings(
    expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]
) -> list[tuple[int, list[int], int, int]]:
    """Where rows part: (row, ids that agree, the one token, the other). Raises ValueError where lengths differ."""
    parted = []
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        if len(one) != len(other):
            raise ValueError(f"row {index} has {len(other)} tokens, wanted {len(one)}")
        place = next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
        if place is not None:
            parted.append((index, list(one[:place]), one[place], other[place]))
    return parted


@dataclass
class DriverWatch:
    """Memory of a captioning job's driver and the rows of its committed parts, sampled from outside."""

    output: Path
    rows_per_shard: int
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    """Seconds, rows committed, resident bytes."""

    def run(self, process: subprocess.Popen[str], every_s: float = 0.1) -> None:
        """Until the process ends."""
        started = time.perf_counter()
        thread = threading.Thread(target=process.wait)
        thread.start()
        while thread.is_alive():
            resident = _resident_bytes(process.pid)
            rows = self.rows_per_shard * sum(1 for _ in self.output.glob("part-*.parquet"))
            if resident:
                self.samples.append((time.perf_counter() - started, rows, resident))
            thread.join(every_s)

    def table(self, rows: int, working_seconds: float) -> str:
        """Time per image and memory at each quarter. `working_seconds`: from the first admission to the last commit."""
        lines = ["| rows | ms per image of the quarter | driver's RSS MB |", "| --- | --- | --- |"]
        ended = next(seconds for seconds, committed, _ in self.samples if committed >= rows)
        before, done = ended - working_seconds, 0
        for quarter in range(1, 5):
            wanted = rows * quarter // 4
            seconds, committed, resident = next(sample for sample in self.samples if sample[1] >= wanted)
            # Two parts can be committed between two samples, where rows are few.
            each = f"{(seconds - before) / (committed - done) * 1e3:.1f}" if committed > done else "with the one before"
            lines.append(f"| {wanted} | {each} | {resident / 1e6:.0f} |")
            before, done = seconds, committed
        return "\n".join(lines)


def _resident_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmRSS:")), None)
    return int(line.split()[1]) * 1024 if line else 0


def read_json(path: Path) -> Any:
    """The content of a file."""
    return json.loads(path.read_text())
