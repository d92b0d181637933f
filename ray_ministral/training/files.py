"""Files that must be there after a crash: synced, counted and hashed. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ministral.data.files import sync

TEMPORARY = "_tmp."
"""How names of what is not complete begin."""


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written: `path` relative to its checkpoint with `/`, bytes, and SHA-256 in hex.

    SHA-256 because processors have instructions for it: on one that does, it was faster than BLAKE2.
    """

    path: str
    size: int
    sha256: str


def record(folder: Path, path: str) -> FileRecord:
    """The record of the file `path` below `folder`, which is read. Raises OSError."""
    with open(folder / path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(path, os.fstat(file.fileno()).st_size, digest.hexdigest())


def seal(folder: Path, path: str) -> FileRecord:
    """`record` of a file that has just been written, and is made durable. Raises OSError."""
    sync(folder / path)
    return record(folder, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file for people to read, synced."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def put_in_place(temporary: Path, destination: Path) -> None:
    """Give a complete folder its name beside it; one that has the name already gives way.

    A crash in between leaves neither under the name, never a mixture.
    """
    sync(temporary)
    replaced = destination.with_name(f"{TEMPORARY}replaced.{destination.name}")
    if destination.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        destination.rename(replaced)
    temporary.rename(destination)
    sync(destination.parent)
    shutil.rmtree(replaced, ignore_errors=True)
