"""`PartTracker`: which rows of which shard have a result, and which parts are being written. Knows no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_ministral.captioning.request import OK, RowResult
from ray_ministral.data.parts import PartInfo
from ray_ministral.data.shards import Shard


@dataclass(frozen=True)
class Totals:
    """Of this run so far."""

    rows: int = 0
    errors: int = 0
    images: int = 0
    tokens: int = 0


class PartTracker:
    """Collects results until a shard is whole; counts what is done."""

    def __init__(self, shards: Sequence[Shard], committed: Mapping[str, PartInfo]) -> None:
        self.pending = {shard.index: shard for shard in shards if shard.part_name not in committed}
        self.status_counts: Counter[str] = Counter()
        for info in committed.values():
            self.status_counts.update(info.status_counts)
        self.totals = Totals()
        self._results: dict[int, list[RowResult]] = {}

    @property
    def done(self) -> bool:
        """Whether every part is committed."""
        return not self.pending

    def add(self, shard_index: int, result: RowResult, images: int) -> list[RowResult] | None:
        """File a row's result; returns all results of its shard when this was the last one missing."""
        totals = self.totals
        self.totals = Totals(
            rows=totals.rows + 1,
            errors=totals.errors + (result.status != OK),
            images=totals.images + images,
            tokens=totals.tokens + result.completion_tokens,
        )
        results = self._results.setdefault(shard_index, [])
        results.append(result)
        if len(results) < self.pending[shard_index].rows:
            return None
        return self._results.pop(shard_index)

    def committed(self, shard_index: int, info: PartInfo) -> None:
        """A part has its final name."""
        del self.pending[shard_index]
        self.status_counts.update(info.status_counts)
