"""Ledger entries: what the ledger says of one committed part, as a small JSON file."""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray_ministral.data.job_file import json_bytes
from ray_ministral.data.parts import Attempt, PartInfo

SUFFIX = ".json"


@dataclass(frozen=True)
class Entry:
    """One part: rows, rows of each status, bytes, SHA-256 in hex (None for an adopted part, which nobody has read).

    `generation` is that of the pipelines when it was committed, `fingerprint` the digest of the job's.
    `next` is there while a committed part is being replaced: the file is then one or the other.
    """

    part: str
    rows: int
    status_counts: Mapping[str, int]
    bytes: int
    sha256: str | None
    generation: int
    fingerprint: str
    next: Entry | None = None

    @classmethod
    def of(cls, info: PartInfo, sha256: str | None, *, generation: int, fingerprint: str) -> Entry:
        """The entry of a part."""
        return cls(info.name, info.rows, dict(info.status_counts), info.bytes, sha256, generation, fingerprint)

    @classmethod
    def of_attempt(cls, attempt: Attempt, *, generation: int, fingerprint: str) -> Entry:
        """The entry that an attempt gets when it is committed."""
        return cls.of(attempt.info, attempt.sha256, generation=generation, fingerprint=fingerprint)

    @property
    def info(self) -> PartInfo:
        """The part as the rest of the program knows it."""
        return PartInfo(self.part, self.rows, self.status_counts, self.bytes)

    def replaced_by(self, later: Entry) -> Entry:
        """This entry while its part is being replaced."""
        return replace(self, next=later)

    def to_bytes(self) -> builtins.bytes:
        """The content of its file."""
        return json_bytes(asdict(self))

    @classmethod
    def parse(cls, data: builtins.bytes, part: str) -> Entry:
        """The entry of `part`. Raises ValueError for what is none, torn or of another part."""
        try:
            return cls._from_json(json.loads(data), part)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    @classmethod
    def _from_json(cls, value: dict[str, Any], part: str) -> Entry:
        later = value["next"]
        entry = cls(
            part=str(value["part"]),
            rows=int(value["rows"]),
            status_counts={str(status): int(count) for status, count in value["status_counts"].items()},
            bytes=int(value["bytes"]),
            sha256=None if value["sha256"] is None else str(value["sha256"]),
            generation=int(value["generation"]),
            fingerprint=str(value["fingerprint"]),
            next=None if later is None else cls._from_json(later, part),
        )
        if entry.part != part:
            raise ValueError(f"it is that of {entry.part}")
        if sum(entry.status_counts.values()) != entry.rows:
            raise ValueError(f"it has {entry.rows} rows, but counts {sum(entry.status_counts.values())}")
        return entry
