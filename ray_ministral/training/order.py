"""The order of samples: a permutation for each epoch, from the seed and the epoch alone.

It knows nothing of stages, replicas, microbatches or the batch size, so a run that goes on with others of them goes on
with the same samples. Epochs follow each other without a seam: a step that is not filled by the end of one takes the
rest from the next. So every step has the same number of samples (the loss is an average over a step: a last batch of
three would weigh each of its samples many times as much), and none is lost, as the last ones of each epoch would be if
unfilled steps were dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ray_ministral.errors import ConfigError, InputError

DATA_IN_MEMORY = 512 << 20
"""Bytes, by the files' footers, up to which the samples of an epoch are one permutation of all. Data takes up to about
twice as much in memory as a footer says, and the reader's cache has that."""


@dataclass(frozen=True, order=True)
class Cursor:
    """The next sample: place `index` in the permutation of `epoch`, both counted from 0."""

    epoch: int = 0
    index: int = 0


class SampleOrder:
    """Which samples come when."""

    def __init__(
        self, num_samples: int, seed: int, *, group_rows: Sequence[int] | None = None, window: int | None = None
    ) -> None:
        """`num_samples` are numbered from 0. Without more, an epoch is one permutation of all.

        Data that is too large to be kept in memory wants neighbours together: with `group_rows` (samples of each row
        group, in order) and `window`, row groups are permuted whole, and samples only within windows of so many.
        """
        if num_samples < 1:
            raise InputError("there is nothing to train on: --train has no rows")
        if (group_rows is None) != (window is None):
            raise ValueError("group_rows and window go together: give both, or neither")
        if group_rows is not None and sum(group_rows) != num_samples:
            raise ValueError(f"row groups of {sum(group_rows)} rows together, wanted {num_samples}")
        if window is not None and window < 1:
            raise ValueError(f"a window needs a sample at least, got {window}")
        self.num_samples = num_samples
        self.seed = seed
        self._group_rows = None if group_rows is None else tuple(group_rows)
        self.window = window
        self._permutations: dict[int, np.ndarray] = {}

    def permutation(self, epoch: int) -> np.ndarray:
        """All samples in the order of `epoch`, int64 `[num_samples]`, not to be written to."""
        if epoch not in self._permutations:
            # a step may lie across two epochs, hardly ever across more
            for old in sorted(self._permutations)[:-1]:
                del self._permutations[old]
            permutation = self._permute(epoch)
            permutation.setflags(write=False)
            self._permutations[epoch] = permutation
        return self._permutations[epoch]

    def cursor_at(self, step: int, global_batch_size: int) -> Cursor:
        """Where step `step` (counted from 0) begins, if all before it had `global_batch_size` samples."""
        return Cursor(*divmod(step * global_batch_size, self.num_samples))

    def take(self, cursor: Cursor, count: int) -> tuple[tuple[int, ...], Cursor]:
        """`count` samples from `cursor` on, and the cursor after them."""
        epoch, index = cursor.epoch, cursor.index
        taken: list[int] = []
        while len(taken) < count:
            piece = self.permutation(epoch)[index : index + count - len(taken)]
            taken.extend(piece.tolist())
            index += len(piece)
            if index == self.num_samples:
                epoch, index = epoch + 1, 0
        return tuple(taken), Cursor(epoch, index)

    def step_samples(self, step: int, global_batch_size: int) -> tuple[int, ...]:
        """The samples of step `step`, counted from 0."""
        return self.take(self.cursor_at(step, global_batch_size), global_batch_size)[0]

    def num_steps(self, epochs: int, global_batch_size: int) -> int:
        """Steps until every sample has come `epochs` times (a few come once more, to fill the last step)."""
        return -(-epochs * self.num_samples // global_batch_size)

    def _permute(self, epoch: int) -> np.ndarray:
        keys = self._random(epoch, 0, self.num_samples)
        if self._group_rows is None or self.window is None:
            return np.argsort(keys, kind="stable")
        groups = np.argsort(self._random(epoch, 1, len(self._group_rows)), kind="stable")
        starts = [0, *accumulate(self._group_rows)]
        by_group = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in groups])
        for start in range(0, self.num_samples, self.window):
            window = slice(start, start + self.window)
            by_group[window] = by_group[window][np.argsort(keys[window], kind="stable")]
        return by_group

    def _random(self, epoch: int, stream: int, count: int) -> np.ndarray:
        """uint64 `[count]`.

        Raw output of Philox and a stable sort, since numpy does not promise that `Generator.permutation` stays the same
        from one version to the next (NEP 19), and a run may be resumed by another.
        """
        philox = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64), counter=stream << 192)
        return philox.random_raw(count)


def choose_window(num_samples: int, num_bytes: int, room: int = DATA_IN_MEMORY) -> int | None:
    """The window of a `SampleOrder` for data of so many bytes: None where all of it fits into `room`.

    Otherwise half the room by the mean size of a sample, since where two windows meet both are needed. It follows from
    the data alone: the same on every machine.
    """
    return None if num_bytes <= room else max(1, num_samples * (room // 2) // num_bytes)


def plan_order(
    group_rows: Sequence[int], group_bytes: Sequence[int], seed: int, held: Mapping[str, Any] | None = None
) -> SampleOrder:
    """The order for data of these row groups; of a run that goes on the one that it had.

    `held` is what its checkpoint says, `order_state` and more. Raises ConfigError where the data is another.
    """
    rows = sum(group_rows)
    if held is None:
        window = choose_window(rows, sum(group_bytes))
    else:
        window = held.get("window")
        now = {"rows": rows, "row_groups": len(group_rows)}
        changed = [f"{name}: {held[name]} -> {now[name]}" for name in now if held.get(name, now[name]) != now[name]]
        if changed:
            raise ConfigError(
                f"the data of --train changed since the last checkpoint ({', '.join(changed)}), so its samples would "
                "come in another order: give the run its data back, or start anew with another --output"
            )
    return SampleOrder(rows, seed, group_rows=None if window is None else group_rows, window=window)


def order_state(group_rows: Sequence[int], order: SampleOrder) -> dict[str, Any]:
    """What decides the order besides the seed, as plain JSON for a checkpoint."""
    return {"rows": order.num_samples, "row_groups": len(group_rows), "window": order.window}
