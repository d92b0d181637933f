"""`PartTracker`: which rows of which shard have a result, and which parts are done. Knows no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
    """Collects results until a shard is whole; counts what is done.

    A shard is wanted unless its part is `committed`; of a committed part whose index is in `failed_rows` these rows are
    wanted again.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        committed: Mapping[str, PartInfo],
        failed_rows: Mapping[int, Sequence[int]],
    ) -> None:
        self._failed_rows = failed_rows
        self._pending = {
            shard.index: shard for shard in shards if shard.part_name not in committed or shard.index in failed_rows
        }
        self._missing = {
            index: len(failed_rows[index]) if index in failed_rows else shard.rows
            for index, shard in self._pending.items()
        }
        self.done_before = sum(shard.rows for shard in shards) - sum(self._missing.values())
        self._committed = {name: info.status_counts for name, info in committed.items()}
        self._errors_before = sum(info.errors for info in committed.values()) - sum(map(len, failed_rows.values()))
        self._results: dict[int, dict[int, RowResult]] = {}
        self.totals = Totals()

    @property
    def done(self) -> bool:
        """Whether every part is committed."""
        return not self._pending

    @property
    def errors(self) -> int:
        """Failed rows of the whole job so far, those of earlier runs included."""
        return self._errors_before + self.totals.errors

    @property
    def status_counts(self) -> dict[str, int]:
        """Rows of each status in the committed parts."""
        total: Counter[str] = Counter()
        for counts in self._committed.values():
            total.update(counts)
        return dict(sorted(total.items()))

    def wanted(self) -> Iterator[Shard]:
        """What is to be prepared, in input order: whole shards, and single rows of those that are tried again."""
        for index, shard in self._pending.items():
            if index in self._failed_rows:
                for row in self._failed_rows[index]:
                    yield replace(shard, start=row, stop=row + 1)
            else:
                yield shard

    def add(self, shard_index: int, result: RowResult, images: int) -> list[RowResult] | None:
        """File a row's result; returns all results of its shard when this was the last one missing.

        AssertionError for a row that has one already: exactly once is what this package is for.
        """
        results = self._results.setdefault(shard_index, {})
        assert shard_index in self._pending, f"row {result.row} of shard {shard_index} is committed already"
        assert result.row not in results, f"row {result.row} of shard {shard_index} has a result already"
        totals = self.totals
        self.totals = Totals(
            rows=totals.rows + 1,
            errors=totals.errors + (result.status != OK),
            images=totals.images + images,
            tokens=totals.tokens + result.completion_tokens,
        )
        results[result.row] = result
        if len(results) < self._missing[shard_index]:
            return None
        return list(self._results.pop(shard_index).values())

    def committed(self, shard_index: int, info: PartInfo) -> None:
        """A part is in the ledger."""
        del self._pending[shard_index]
        self._committed[info.name] = info.status_counts
