"""The lease of an output folder: one job at a time writes there, and it can be told whether that job still lives.

    _lease.json     who writes here: run, host, process, since when, and a counter that a heartbeat moves

No clock of one machine is compared with that of another: a holder elsewhere is watched for a while, and lives if its
counter moves. A holder on this machine is looked up among the processes. On local disks exclusive creation and a lock
on the folder settle who takes a lease; elsewhere it is read again after a pause. Should two ever believe that they hold
it, the file has one name in it, and the other is told at its next heartbeat or commit, whichever is first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.fs as pafs

from ray_ministral.data.files import TEMPORARY_PREFIX, Location, delete_quietly, typed_full_disk, write_file
from ray_ministral.data.holder import Holder
from ray_ministral.errors import ConfigError, LeaseLostError

logger = logging.getLogger(__name__)

LEASE_FILE = "_lease.json"
LEASE_ATTEMPT = f"{TEMPORARY_PREFIX}{LEASE_FILE}."
"""How the heartbeat's temporary files begin. Only who takes the lease removes them: they may be of a living job."""

HEARTBEAT_S = 3.0
MISSED_HEARTBEATS = 3
"""A holder elsewhere whose counter does not move for so many of its heartbeats is taken for dead."""

LONGEST_HEARTBEAT_S = 60.0  # whatever a lease says: a wait must end
POLL_S = 0.2
SETTLE_S = 1.0  # until a rival's write, begun before ours was seen, has come to an object store
LOCK_TIMEOUT_S = 10.0
READ_AGAIN = 4  # times, POLL_S apart: a replaced file is missing or torn for a moment where renaming is not atomic


class Lease:
    """The right to write into a folder, held by this process until `release`. Take it with `Lease.take`."""

    def __init__(self, folder: Location, holder: Holder) -> None:
        self._folder = folder
        self._holder = holder
        self._lost: str | None = None
        self._ended = threading.Event()
        # A daemon: it must never keep a process alive, and a lease whose process is gone is taken at once.
        self._heart = threading.Thread(target=self._beat, name="lease heartbeat", daemon=True)

    @classmethod
    def take(cls, folder: Location) -> Lease:
        """Take the lease of a folder (which exists), if need be from a job that is dead.

        Raises ConfigError, with who it is, where another job holds it; OutputError for a full disk; OSError. Takes some
        heartbeats where the holder is on another machine.
        """
        own = Holder.this_process(HEARTBEAT_S)
        while True:
            found = _read(folder)
            if found is not None:
                found = _of_the_dead(folder, found)
                if found is None:
                    continue  # it was given back while we watched
            with typed_full_disk(folder.child(LEASE_FILE).name):
                taken = _swap(folder, found, own.to_bytes())
            if taken:
                _sweep(folder)
                lease = cls(folder, own)
                lease._heart.start()
                return lease

    def check(self) -> None:
        """Raises LeaseLostError if the lease is not this job's any more; OSError where it cannot be read."""
        if self._lost is None:
            data = _read_patiently(self._folder)
            holder = Holder.parse(data) if data is not None else None
            if holder is not None and holder.run == self._holder.run:
                return
            self._lost = holder.describe() if holder is not None else f"{LEASE_FILE} is gone"
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """As `check`, but by what is known already: it reads nothing."""
        if self._lost is not None:
            raise LeaseLostError(
                f"another job has taken over --output {self._folder.name} ({self._lost}): this one stops, and leaves "
                "what it has committed to the other"
            )

    def release(self) -> None:
        """Ends the heartbeat and gives the lease back. Does not raise: what matters is done by then."""
        self._ended.set()
        self._heart.join(timeout=LOCK_TIMEOUT_S)
        with contextlib.suppress(OSError), _locked(self._folder):
            data = _read(self._folder)
            holder = Holder.parse(data) if data is not None else None
            if holder is not None and holder.run == self._holder.run:
                delete_quietly(self._folder.child(LEASE_FILE))

    def _beat(self) -> None:
        failing = False
        while not self._ended.wait(self._holder.heartbeat_s) and self._lost is None:
            try:
                self._renew()
                failing = False
            except (OSError, pa.ArrowException) as error:
                if not failing:
                    logger.warning("the lease of %s cannot be renewed: %s", self._folder.name, error)
                failing = True

    def _renew(self) -> None:
        # Nobody listens to the heartbeat: that the lease is lost is said by `raise_if_lost`, in the driver's loop.
        with contextlib.suppress(LeaseLostError), _locked(self._folder):
            self.check()
            if self._ended.is_set():  # while we waited for the lock or the disk
                return
            self._holder = replace(self._holder, counter=self._holder.counter + 1)
            write_file(self._folder, LEASE_FILE, self._holder.to_bytes(), durable=False)


def _of_the_dead(folder: Location, found: bytes) -> bytes | None:
    """The lease in a folder once it is certain that its holder is dead; None where it was given back meanwhile.

    Raises ConfigError as soon as it is certain that the holder lives.
    """
    while True:
        holder = Holder.parse(found)
        state = holder.state() if holder is not None else "unknown"
        if holder is not None and state == "alive":
            raise _refusal(folder, holder)
        if holder is not None and state == "gone":
            logger.info("%s: the job of %s is gone: taking over", folder.name, holder.describe())
            return found
        heartbeat = holder.heartbeat_s if holder is not None else HEARTBEAT_S
        seconds = MISSED_HEARTBEATS * max(POLL_S, min(heartbeat, LONGEST_HEARTBEAT_S))
        who = holder.describe() if holder is not None else "a lease that cannot be read"
        logger.info("%s is held by %s: watching for %.0f s whether it lives", folder.name, who, seconds)
        now = _watch(folder, found, seconds)
        if now is None:
            return None
        if now == found:
            logger.info("%s: no heartbeat of %s: taking over", folder.name, who)
            return found
        later = Holder.parse(now)
        if holder is not None and later is not None and later.run == holder.run:
            raise _refusal(folder, later)
        found = now  # another one has taken it, or it has become readable


def _refusal(folder: Location, holder: Holder) -> ConfigError:
    return ConfigError(
        f"--output {folder.name} is being written by another job ({holder.describe()}): wait until it has ended, stop "
        "it, or give another --output"
    )


def _watch(folder: Location, found: bytes, seconds: float) -> bytes | None:
    """What the lease is after so long, or as soon as it is not `found` any more; None where it is gone."""
    deadline = time.monotonic() + seconds
    while True:
        now = _read_patiently(folder)
        if now != found or time.monotonic() > deadline:
            return now
        time.sleep(POLL_S)


def _swap(folder: Location, expected: bytes | None, own: bytes) -> bool:
    """Puts `own` where `expected` is (None: nothing); whether it succeeded, or somebody else was quicker."""
    with _locked(folder) as locked:
        if _read(folder) != expected:
            return False
        if expected is None and folder.is_local:
            return _create(folder, own)
        try:
            write_file(folder, LEASE_FILE, own)
        except FileNotFoundError:  # somebody else has taken it, and removed what we had begun
            return False
    if locked:
        return True
    time.sleep(SETTLE_S)
    return _read_patiently(folder) == own


def _create(folder: Location, own: bytes) -> bool:
    """On a local disk: the file with this content, unless there is one."""
    path = folder.child(LEASE_FILE).path
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(own)
    except BaseException:
        os.unlink(path)
        raise
    return True


@contextlib.contextmanager
def _locked(folder: Location) -> Iterator[bool]:
    """A lock on a local folder, for the moment in which its lease changes hands; false where there are no such locks.

    The system gives it back when its holder dies.
    """
    descriptor = None
    if folder.is_local:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder.path, os.O_RDONLY)
    try:
        yield descriptor is not None and _flock(descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _flock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # no Unix
        return False
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(POLL_S / 10)
        except OSError:  # a network filesystem without locks
            return False
    return False


def _sweep(folder: Location) -> None:
    """Removes what heartbeats of dead jobs have left."""
    for info in folder.filesystem.get_file_info(pafs.FileSelector(folder.path)):
        if info.base_name.startswith(LEASE_ATTEMPT):
            delete_quietly(folder.child(info.base_name))


def _read(folder: Location) -> bytes | None:
    place = folder.child(LEASE_FILE)
    try:
        with place.filesystem.open_input_stream(place.path) as stream:
            return bytes(stream.read())
    except FileNotFoundError:
        return None


def _read_patiently(folder: Location) -> bytes | None:
    """As `_read`, but a file that is missing or torn is looked at again: it may be in the middle of being replaced."""
    for _ in range(READ_AGAIN):
        data = _read(folder)
        if data is not None and Holder.parse(data) is not None:
            return data
        time.sleep(POLL_S)
    return _read(folder)
