"""The output folder: what job it belongs to, which parts are committed, and whether it is finished.

    _job.json          the fingerprint of the job that began it, written first
    part-*.parquet     committed parts; a part is committed when it has this name
    _tmp.*             attempts; whatever lies there when a ledger is opened is of a dead attempt and is removed
    summary.json       written at the end
    _SUCCESS           empty, written last

Nothing is kept in memory that the folder does not say, so a ledger that is opened again knows all it ever knew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.fs as pafs

from ray_ministral.data.files import TEMPORARY_PREFIX, Location, locate, write_file
from ray_ministral.data.parts import PartInfo, read_part_info
from ray_ministral.errors import ConfigError, UsageError

JOB_FILE = "_job.json"
SUMMARY_FILE = "summary.json"
SUCCESS_FILE = "_SUCCESS"

FOOTERS_AT_ONCE = 16
SHOWN_DIFFERENCES = 8
_SHOWN_VALUE = 120


class Ledger:
    """An output folder that belongs to one job. Open it with `Ledger.open`."""

    def __init__(self, folder: Location) -> None:
        self._folder = folder

    @classmethod
    def open(cls, output: str, fingerprint: Mapping[str, Any], *, create: bool = True) -> Ledger:
        """Opens the folder `output` (path or URI) for the job with this `fingerprint`, a plain JSON object.

        A missing or empty folder is begun with the fingerprint; with `create` false nothing at all is written, and a
        missing folder counts as one without parts. Temporary files of dead attempts are removed.

        Raises ConfigError for a folder that another job began (with the differences, key by key), for a folder that has
        something in it but was begun by no job, and where the folder cannot be read or written.
        """
        folder = locate(output)
        try:
            names = _names(folder)
            if JOB_FILE in names:
                _refuse_another_job(folder, fingerprint)
            elif any(not name.startswith(TEMPORARY_PREFIX) for name in names):
                raise ConfigError(
                    f"--output {folder.name} is not empty and was not begun by a captioning job (it has no "
                    f"{JOB_FILE}, but {_some(names)}): give an empty or new folder"
                )
            if create:
                for name in names:
                    if name.startswith(TEMPORARY_PREFIX):
                        folder.filesystem.delete_file(folder.child(name).path)
                if JOB_FILE not in names:
                    folder.filesystem.create_dir(folder.path, recursive=True)
                    write_file(folder, JOB_FILE, _json_bytes(fingerprint))
        except UsageError:
            raise
        except OSError as error:
            raise ConfigError(
                f"--output {folder.name} cannot be used: {error}; give a folder that can be read and written"
            ) from error
        return cls(folder)

    @property
    def output(self) -> str:
        """The folder as another process can open it: an absolute path or a URI; what `write_part` takes."""
        return self._folder.location

    def committed(self) -> dict[str, PartInfo]:
        """The committed parts by name, with rows and counts from their footers.

        Raises InputError for a part that is damaged or not ours.
        """
        names = sorted(name for name in _names(self._folder) if name.startswith("part-") and name.endswith(".parquet"))
        with ThreadPoolExecutor(max_workers=FOOTERS_AT_ONCE) as pool:
            infos = pool.map(lambda name: read_part_info(self._folder, name), names)
            return {info.name: info for info in infos}

    @property
    def is_finished(self) -> bool:
        """Whether the job has ended with every part committed."""
        return SUCCESS_FILE in _names(self._folder)

    def summary(self) -> dict[str, Any] | None:
        """What `finish` was given, or None before that."""
        return _read_json(self._folder.child(SUMMARY_FILE)) if SUMMARY_FILE in _names(self._folder) else None

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, then `_SUCCESS`. Raises OSError."""
        write_file(self._folder, SUMMARY_FILE, _json_bytes(summary))
        write_file(self._folder, SUCCESS_FILE, b"")

    def reopen(self) -> None:
        """Takes `_SUCCESS` away, before committed parts are replaced (`--retry-failed`). Raises OSError."""
        if self.is_finished:
            self._folder.filesystem.delete_file(self._folder.child(SUCCESS_FILE).path)


def _names(folder: Location) -> set[str]:
    """What lies in the folder; nothing where it does not exist."""
    info = folder.filesystem.get_file_info(folder.path)
    if info.type == pafs.FileType.File:
        raise ConfigError(f"--output {folder.name} is a file: give a folder")
    infos = folder.filesystem.get_file_info(pafs.FileSelector(folder.path, allow_not_found=True))
    return {info.base_name for info in infos}


def _refuse_another_job(folder: Location, fingerprint: Mapping[str, Any]) -> None:
    began = _read_json(folder.child(JOB_FILE))
    now = json.loads(_json_bytes(fingerprint))
    differences = list(_differences(began, now, ""))
    if not differences:
        return
    shown = "; ".join(differences[:SHOWN_DIFFERENCES])
    more = len(differences) - SHOWN_DIFFERENCES
    raise ConfigError(
        f"--output {folder.name} belongs to another job: {shown}{f'; and {more} more' if more > 0 else ''}: "
        "run the same command to go on with it, or give another --output"
    )


def _differences(began: object, now: object, key: str) -> Iterator[str]:
    """Where two JSON values differ, as `key: before -> now`."""
    if isinstance(began, dict) and isinstance(now, dict):
        for name in sorted(began.keys() | now.keys()):
            below = f"{key}.{name}" if key else str(name)
            if name not in began:
                yield f"{below}: (absent) -> {_short(now[name])}"
            elif name not in now:
                yield f"{below}: {_short(began[name])} -> (absent)"
            else:
                yield from _differences(began[name], now[name], below)
    elif began != now or type(began) is not type(now):
        yield f"{key}: {_short(began)} -> {_short(now)}"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_VALUE else f"{text[:_SHOWN_VALUE]}…"


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (", …" if len(names) > len(first) else "")


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _read_json(place: Location) -> dict[str, Any]:
    try:
        with place.filesystem.open_input_stream(place.path) as stream:
            value = json.loads(stream.read())
    except ValueError as error:
        raise ConfigError(f"{place.name} is not JSON ({error}): give another --output") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{place.name} holds no JSON object: give another --output")
    return value
