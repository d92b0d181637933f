"""The output folder: what job it belongs to, which parts are committed, and whether it is finished.

    _lease.json           who writes here now; see `lease`
    _ledger/_format.json  that parts have entries here; written before the job's record
    _job.json             the fingerprint of the job that began it
    part-*.parquet        parts
    _ledger/part-*.json   the entry of each committed part: rows, statuses, bytes, SHA-256, generation, fingerprint
    _tmp.*                attempts that are not committed; those of dead jobs are removed
    summary.json          written at the end
    _SUCCESS              empty, written last

**What counts.** A part counts if it has an entry of this fingerprint, and the file is there with the entry's size.
Anything else is done again and overwritten: a part without an entry (a crash between the rename and the entry, or a
rename that left half a file), an entry that is damaged, without a file, or with a file of another size.

**A commit** is made by the driver alone, which holds the lease: it looks whether it still does, renames the attempt,
syncs the folder, looks again, and writes the entry. Writers only make attempts: one that was given up does no harm.

**A part that is replaced** (`--retry-failed`) must not be lost in a crash, the older captions neither. So its entry is
first written again with the new one beside it (`next`); then come rename, sync and the new entry. Where an entry with
a `next` is found, the file's SHA-256 says which of the two it is, and the entry is put right; a file that is neither,
torn by a rename that is not atomic, is done again.

**Parts from before there was a ledger** (a `_job.json` and no `_ledger/_format.json`) are adopted when the folder is
opened: what their footers say becomes their entries, without a SHA-256.

Nothing is kept in memory that the folder does not say, so a ledger that is opened again knows all it ever knew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow.fs as pafs

from ray_ministral.data.entries import SUFFIX, Entry
from ray_ministral.data.files import (
    TEMPORARY_PREFIX,
    Location,
    delete_quietly,
    locate,
    put_in_place,
    sha256_of,
    sync_folder,
    typed_full_disk,
    write_file,
)
from ray_ministral.data.fingerprint import digest_of
from ray_ministral.data.job_file import JOB_FILE, json_bytes, read_json, refuse_another_job
from ray_ministral.data.lease import LEASE_ATTEMPT, LEASE_FILE, Lease
from ray_ministral.data.parts import Attempt, PartInfo, read_part_info
from ray_ministral.errors import ConfigError, InputError, OutputError

logger = logging.getLogger(__name__)

ENTRIES_FOLDER = "_ledger"
FORMAT_FILE = "_format.json"
SUMMARY_FILE = "summary.json"
SUCCESS_FILE = "_SUCCESS"

FORMAT = 1
"""Grows when the folder's rules change so that an older version of this package must not touch it."""

READS_AT_ONCE = 32
SHOWN_PARTS = 5


class Ledger:
    """An output folder that belongs to one job. Open it with `Ledger.open`, and `close` it.

    `lease` is None for one that only looks.
    """

    def __init__(self, folder: Location, fingerprint: Mapping[str, Any], lease: Lease | None) -> None:
        self._folder = folder
        self._entries = folder.child(ENTRIES_FOLDER)
        self._fingerprint = digest_of(fingerprint)
        self._lease = lease

    @classmethod
    def open(cls, output: str, fingerprint: Mapping[str, Any], *, create: bool = True) -> Ledger:
        """Opens the folder `output` (path or URI) for the job with this `fingerprint`, a plain JSON object.

        A missing or empty folder is begun with the fingerprint, its lease is taken, attempts of dead jobs are removed,
        parts from before there was a ledger are adopted. With `create` false nothing at all is written, and a missing
        folder counts as one without parts.

        Raises ConfigError for a folder that another job began (with the differences, key by key), that another job is
        writing into, that has something in it but was begun by no job, and where the folder cannot be read or written;
        OutputError for a full disk.
        """
        folder = locate(output)
        with _typed_errors(folder):
            _refuse_unfit(folder, _names(folder), fingerprint)
            if not create:
                return cls(folder, fingerprint, lease=None)
            folder.filesystem.create_dir(folder.path, recursive=True)
            ledger = cls(folder, fingerprint, Lease.take(folder))
            try:
                ledger._begin(fingerprint)
            except BaseException:
                ledger.close()
                raise
        return ledger

    def close(self) -> None:
        """Gives the folder back, so that another job may write there. Does not raise."""
        if self._lease is not None:
            self._lease.release()

    @property
    def output(self) -> str:
        """The folder as another process can open it: an absolute path or a URI; what `write_part` takes."""
        return self._folder.location

    @property
    def lease(self) -> Lease:
        """The right to write here."""
        assert self._lease is not None, "the ledger was opened to look only"
        return self._lease

    def committed(self) -> dict[str, PartInfo]:
        """The committed parts by name, as their entries have them.

        Parts that do not count are named in a warning; their entries, if they have any, are removed. Raises ConfigError
        where the folder cannot be read any more.
        """
        with _typed_errors(self._folder):
            sizes = {name: info.size for name, info in _listing(self._folder).items() if _is_part(name)}
            if self._lease is None and self._is_of_old:
                return {name: entry.info for name, entry in self._read_footers(sorted(sizes)).items()}
            names = sorted(sizes.keys() | {name.removesuffix(SUFFIX) for name in self._entry_names()})
            with ThreadPoolExecutor(max_workers=READS_AT_ONCE) as pool:
                results = list(pool.map(lambda name: self._settled(name, sizes.get(name)), names))
            entries = {result.part: result for result in results if isinstance(result, Entry)}
            again = [
                f"{name} ({reason})" for name, reason in zip(names, results, strict=True) if isinstance(reason, str)
            ]
            _warn_of(self._folder, again)
            return {name: entry.info for name, entry in entries.items()}

    def commit(self, attempt: Attempt, *, generation: int) -> PartInfo:
        """Gives an attempt its final name, then enters it; see the top of this file. Only the driver calls this.

        `generation` is noted in the entry. Raises LeaseLostError where another job has taken the folder over,
        OutputError where the disk is full or the attempt cannot be seen from here, and for any other OSError.
        """
        name = attempt.info.name
        entry = Entry.of_attempt(attempt, generation=generation, fingerprint=self._fingerprint)
        try:
            with typed_full_disk(self._folder.child(name).name):
                self._check_lease()
                self._announce(entry)
                self._rename(attempt)
                self._sync()
                self._check_lease()
                self._enter(entry)
        except OSError as error:
            raise OutputError(
                f"{self._folder.child(name).name} cannot be committed: {error}; mend that, and the same command goes on"
            ) from error
        return entry.info

    @property
    def is_finished(self) -> bool:
        """Whether the job has ended with every part committed."""
        return SUCCESS_FILE in _names(self._folder)

    def summary(self) -> dict[str, Any] | None:
        """What `finish` was given, or None before that."""
        return read_json(self._folder.child(SUMMARY_FILE)) if SUMMARY_FILE in _names(self._folder) else None

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Removes what attempts have left, writes summary.json, then `_SUCCESS`.

        Raises LeaseLostError where another job has taken the folder over, OutputError for any OSError.
        """
        try:
            with typed_full_disk(self._folder.child(SUMMARY_FILE).name):
                self._check_lease()
                self._sweep()
                write_file(self._folder, SUMMARY_FILE, json_bytes(summary))
                write_file(self._folder, SUCCESS_FILE, b"")
        except OSError as error:
            raise OutputError(
                f"the end of the job cannot be written into {self._folder.name}: {error}; mend that, and the same "
                "command goes on"
            ) from error

    def reopen(self) -> None:
        """Takes `_SUCCESS` away, before committed parts are replaced (`--retry-failed`). Raises OSError."""
        if self.is_finished:
            self._folder.filesystem.delete_file(self._folder.child(SUCCESS_FILE).path)

    # Opening

    def _begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Everything that is done first by a job that has the lease. May be repeated after a crash at any step."""
        names = _names(self._folder)
        _refuse_unfit(self._folder, names, fingerprint)  # once more: nobody else writes from here on
        self._entries.filesystem.create_dir(self._entries.path, recursive=True)
        self._sync()
        self._sweep()
        if JOB_FILE not in names:
            write_file(self._entries, FORMAT_FILE, json_bytes({"format": FORMAT}))
            write_file(self._folder, JOB_FILE, json_bytes(fingerprint))
        elif self._is_of_old:
            self._adopt(sorted(name for name in names if _is_part(name)))

    @property
    def _is_of_old(self) -> bool:
        """Whether a job was begun here before parts had entries."""
        return JOB_FILE in _names(self._folder) and FORMAT_FILE not in _listing(self._entries)

    def _adopt(self, parts: Sequence[str]) -> None:
        entries = self._read_footers(parts)
        if parts:
            logger.info("%s was begun without a ledger: adopting %d parts", self._folder.name, len(entries))
        with ThreadPoolExecutor(max_workers=READS_AT_ONCE) as pool:
            list(pool.map(self._enter, entries.values()))
        write_file(self._entries, FORMAT_FILE, json_bytes({"format": FORMAT}))

    def _read_footers(self, parts: Sequence[str]) -> dict[str, Entry]:
        """An entry for each part whose footer is ours and whole."""

        def read(name: str) -> Entry | str:
            try:
                info = read_part_info(self._folder, name)
            except InputError as error:
                return str(error)
            return Entry.of(info, None, generation=0, fingerprint=self._fingerprint)

        with ThreadPoolExecutor(max_workers=READS_AT_ONCE) as pool:
            results = list(pool.map(read, parts))
        _warn_of(self._folder, [result for result in results if isinstance(result, str)])
        return {result.part: result for result in results if isinstance(result, Entry)}

    def _sweep(self) -> None:
        """Removes all attempts. Who has the lease knows of none that is still wanted."""
        for folder in (self._folder, self._entries):
            for name in _listing(folder):
                if name.startswith(TEMPORARY_PREFIX) and not name.startswith(LEASE_ATTEMPT):
                    delete_quietly(folder.child(name))

    # Entries

    def _entry_names(self) -> list[str]:
        return [name for name in _listing(self._entries) if name.startswith("part-") and name.endswith(SUFFIX)]

    def _entry_of(self, part: str) -> Entry | None:
        """None where there is none. Raises ValueError for one that is damaged or of another job, OSError."""
        place = self._entries.child(f"{part}{SUFFIX}")
        try:
            with place.filesystem.open_input_stream(place.path) as stream:
                entry = Entry.parse(stream.read(), part)
        except FileNotFoundError:
            return None
        if entry.fingerprint != self._fingerprint:
            raise ValueError("it is of another job")
        return entry

    def _settled(self, part: str, size: int | None) -> Entry | str:
        """The entry of a part that counts; else why it does not. `size` in bytes, None where it is not there."""
        try:
            entry = self._entry_of(part)
        except ValueError as error:
            return self._dropped(part, f"its entry is damaged: {error}")
        if entry is None:
            return "it was never entered in the ledger"
        if size is None:
            return self._dropped(part, "the file is gone")
        if entry.next is not None:
            return self._settle_replacement(entry, entry.next, size)
        if entry.bytes != size:
            return self._dropped(part, f"the file has {size} bytes, wanted {entry.bytes}")
        return entry

    def _settle_replacement(self, before: Entry, after: Entry, size: int) -> Entry | str:
        """Which of two the file is, after a crash while it was replaced."""
        sha256 = sha256_of(self._folder.child(before.part)) if size in (before.bytes, after.bytes) else None
        if sha256 == after.sha256:
            settled = after
        elif size == before.bytes and before.sha256 in (sha256, None):
            settled = replace(before, next=None)
        else:
            return self._dropped(before.part, "a crash has left half of it while it was replaced")
        if self._lease is not None:
            self._enter(settled)
        return settled

    def _dropped(self, part: str, reason: str) -> str:
        """Remove an entry that does not count: it must not come to speak for a file that is written later."""
        if self._lease is not None:
            delete_quietly(self._entries.child(f"{part}{SUFFIX}"))
        return reason

    # The steps of a commit, each of which may be the last thing that this process does

    def _check_lease(self) -> None:
        self.lease.check()

    def _announce(self, entry: Entry) -> None:
        """Where the part is there already: note beside its entry what is about to replace it."""
        try:
            before = self._entry_of(entry.part)
        except ValueError:  # damaged, so nothing that counts is replaced
            return
        if before is not None:
            self._enter(before.replaced_by(entry))

    def _rename(self, attempt: Attempt) -> None:
        try:
            put_in_place(self._folder, attempt.name, attempt.info.name)
        except FileNotFoundError as error:
            raise OutputError(
                f"{attempt.name}, which a worker has written, is not in {self._folder.name} as the driver sees it: "
                "--output must be a folder that all nodes share, or a filesystem URI"
            ) from error

    def _sync(self) -> None:
        sync_folder(self._folder)

    def _enter(self, entry: Entry) -> None:
        write_file(self._entries, f"{entry.part}{SUFFIX}", entry.to_bytes())


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".parquet")


def _warn_of(folder: Location, parts: Sequence[str]) -> None:
    if parts:
        more = f", and {len(parts) - SHOWN_PARTS} more" if len(parts) > SHOWN_PARTS else ""
        logger.warning("%s: these parts are done again: %s%s", folder.name, ", ".join(parts[:SHOWN_PARTS]), more)


@contextmanager
def _typed_errors(folder: Location) -> Iterator[None]:
    try:
        with typed_full_disk(folder.name):
            yield
    except OSError as error:
        raise ConfigError(
            f"--output {folder.name} cannot be used: {error}; give a folder that can be read and written"
        ) from error


def _refuse_unfit(folder: Location, names: set[str], fingerprint: Mapping[str, Any]) -> None:
    """A folder that another job began, or a later version of this package, or that was begun by no job."""
    if JOB_FILE in names:
        refuse_another_job(folder, fingerprint)
        rules = folder.child(ENTRIES_FOLDER).child(FORMAT_FILE)
        if rules.filesystem.get_file_info(rules.path).type == pafs.FileType.File:
            found = read_json(rules).get("format")
            if found != FORMAT:
                raise ConfigError(
                    f"{rules.name} has format {found}, this version of ray_ministral knows format {FORMAT}: go on with "
                    "the version that began the job, or give another --output"
                )
        return
    foreign = {name for name in names - {LEASE_FILE, ENTRIES_FOLDER} if not name.startswith(TEMPORARY_PREFIX)}
    if foreign:
        raise ConfigError(
            f"--output {folder.name} is not empty and was not begun by a captioning job (it has no "
            f"{JOB_FILE}, but {_some(foreign)}): give an empty or new folder"
        )


def _listing(folder: Location) -> dict[str, pafs.FileInfo]:
    """What lies in a folder, by name; nothing where it does not exist."""
    infos = folder.filesystem.get_file_info(pafs.FileSelector(folder.path, allow_not_found=True))
    return {info.base_name: info for info in infos}


def _names(folder: Location) -> set[str]:
    """What lies in the folder; nothing where it does not exist."""
    info = folder.filesystem.get_file_info(folder.path)
    if info.type == pafs.FileType.File:
        raise ConfigError(f"--output {folder.name} is a file: give a folder")
    return set(_listing(folder))


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (", …" if len(names) > len(first) else "")
