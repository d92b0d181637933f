"""Where files are: the one place that knows local paths, folders, globs and filesystem URIs.

A file has three names. `name` is what people see and what is written into the output: as the caller gave it (relative
paths stay relative, so that a job that is submitted again from another copy of the folder is still the same job),
without credentials. `location` is what a process elsewhere opens: an absolute path or a whole URI. `path` is what the
file is called inside its pyarrow filesystem.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from ray_ministral.errors import InputError, OutputError

TEMPORARY_PREFIX = "_tmp."
"""Files under this name are attempts that never were committed; Spark-like readers skip the leading underscore."""

_READ_BYTES = 1 << 20
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_URI = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_GLOB = re.compile(r"[*?\[]")
_URI_GLOB = re.compile(r"[*\[]")  # in a URI a question mark begins the query


@dataclass(frozen=True)
class Location:
    """A file or folder: `name` to show, `location` to hand to another process, `path` inside `filesystem`."""

    name: str
    location: str
    filesystem: pafs.FileSystem = field(repr=False, compare=False)
    path: str

    @property
    def is_local(self) -> bool:
        """Whether `path` is a path of this machine, on which fsync and atomic rename mean something."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def child(self, name: str) -> Location:
        """The entry `name` (a plain file name) of this folder."""
        return _child(self, name)


@dataclass(frozen=True)
class FoundFile:
    """A file that an input stands for; `size` in bytes, None where the filesystem does not tell."""

    place: Location
    size: int | None


def locate(text: str) -> Location:
    """The place that a path or URI names; nothing is opened, globs are not expanded.

    Raises InputError for a URI that pyarrow cannot open.
    """
    if not _URI.match(text):
        expanded = os.path.normpath(os.path.expanduser(text))
        absolute = os.path.abspath(expanded)
        return Location(name=expanded, location=absolute, filesystem=pafs.LocalFileSystem(), path=absolute)
    parts = urlsplit(text)
    if parts.scheme == "file":
        return locate(unquote(parts.path))
    path = quote(unquote(parts.path), safe="/=~")
    query = f"?{parts.query}" if parts.query else ""
    uri = f"{parts.scheme}://{parts.netloc}{path}{query}"
    # `user:password@` and the query (which may hold a key) stay in `location`, and out of whatever is shown or written.
    name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{unquote(parts.path)}"
    try:
        filesystem, inner = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        reason = str(error).replace(uri, name).splitlines()[0]
        raise InputError(
            f"cannot open {name}: {reason}; wanted a local path or a URI that pyarrow knows (file, s3, gs, abfs, "
            "hdfs, hf)"
        ) from error
    return Location(name=name, location=uri, filesystem=filesystem, path=inner)


def find_files(inputs: Sequence[str], *, option: str = "--input") -> list[FoundFile]:
    """The files that `inputs` (files, folders, globs, URIs) stand for, sorted by name, each once.

    Folders are searched to any depth. In folders and globs, entries that begin with `_` or `.` are left out, as Spark
    and Hive do. Raises InputError where an input stands for nothing; it says that `option` is to be mended.
    """
    by_location: dict[str, FoundFile] = {}
    for text in inputs:
        found = list(_expand(text, option))
        if not found:
            raise InputError(
                f"{option} {_shown(text)} stands for no file: give a parquet file, a folder with parquet files, or a "
                "glob (files that begin with _ or . are left out)"
            )
        for file in found:
            by_location.setdefault(file.place.location, file)
    files = sorted(by_location.values(), key=lambda file: file.place.name)
    for before, after in pairwise(files):
        if before.place.name == after.place.name:
            raise InputError(
                f"two inputs are both called {after.place.name}, so their rows could not be told apart in the output: "
                "rename one, or take them in two jobs"
            )
    return files


@dataclass(frozen=True)
class Written:
    """A file under a temporary name, whole and on local disks synced: its name in the folder, bytes, SHA-256 in hex."""

    name: str
    bytes: int
    sha256: str


def write_file(folder: Location, name: str, data: bytes, *, durable: bool = True) -> None:
    """Writes `folder/name` so that it is there whole or not at all. The folder exists.

    With `durable` false nothing is synced: for what means nothing after a crash of the machine. Raises OSError.
    """

    def fill(stream: pa.NativeFile) -> None:
        stream.write(data)

    write_atomically(folder, name, fill, durable=durable)


def write_atomically(
    folder: Location, name: str, fill: Callable[[pa.NativeFile], None], *, durable: bool = True
) -> int:
    """Lets `fill` write a stream, then gives the file its name `folder/name`; returns its size in bytes.

    The bytes go to a temporary name that no other attempt has, are synced, and renamed; an older file of that name is
    replaced. Where renaming is not atomic (object stores) an object still appears whole, since it is copied whole.
    Whatever `fill` raises is raised again, and nothing is left behind.
    """
    written = write_temporary(folder, name, fill, durable=durable)
    try:
        put_in_place(folder, written.name, name)
    except BaseException:
        delete_quietly(folder.child(written.name))
        raise
    if durable:
        sync_folder(folder)
    return written.bytes


def write_temporary(
    folder: Location, name: str, fill: Callable[[pa.NativeFile], None], *, durable: bool = True
) -> Written:
    """Lets `fill` write a stream that becomes an attempt at `folder/name`, under a temporary name that nobody else has.

    The checksum is taken of the bytes on their way. Whatever `fill` raises is raised again, and nothing is left behind.
    """
    temporary = folder.child(f"{TEMPORARY_PREFIX}{name}.{uuid.uuid4().hex}")
    try:
        with folder.filesystem.open_output_stream(temporary.path) as stream:
            sink = _HashingSink(stream)
            fill(pa.PythonFile(sink, mode="w"))
        if durable and folder.is_local:
            sync(temporary.path)
    except BaseException:
        delete_quietly(temporary)
        raise
    return Written(temporary.path.rpartition("/")[2], sink.bytes, sink.digest.hexdigest())


def put_in_place(folder: Location, temporary: str, name: str) -> None:
    """Renames within a folder, over an older file of that name. Raises OSError."""
    folder.filesystem.move(folder.child(temporary).path, folder.child(name).path)


def sync_folder(folder: Location) -> None:
    """Makes the names in a folder outlive a crash of the machine, where the filesystem is local. Raises OSError."""
    if folder.is_local:
        sync(folder.path)


def sha256_of(place: Location) -> str:
    """The SHA-256 of a file, in hex; reads it whole. Raises OSError."""
    digest = hashlib.sha256()
    with place.filesystem.open_input_stream(place.path) as stream:
        while chunk := stream.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def typed_full_disk(what: str) -> Iterator[None]:
    """Turns the error of a full disk (or quota, or size limit) while `what` is written into an OutputError.

    Other errors pass as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise OutputError(
                f"{what} cannot be written, there is no room: {error}; make some, and the same command goes on"
            ) from error
        raise


class _HashingSink:
    """What is written passes on to a stream, counted and hashed; closing it leaves the stream open."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self._stream.write(data)
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self.closed = True


def sync(path: str | os.PathLike[str]) -> None:
    """Makes a file's contents, or the names in a folder, outlive a crash of the machine. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_quietly(place: Location) -> None:
    """Removes a file if it can be removed: it may never have been begun, or be gone already."""
    with contextlib.suppress(OSError):
        place.filesystem.delete_file(place.path)


def _shown(text: str) -> str:
    """`text` without credentials, as an error may show it."""
    if not _URI.match(text):
        return repr(text)
    parts = urlsplit(text)
    return repr(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


def _child(folder: Location, relative: str) -> Location:
    """The place `relative` (slashes between its parts) below `folder`."""

    def below(parent: str, tail: str) -> str:
        # "" and "." are the current folder: its entries are called by their bare names.
        return tail if parent in ("", ".") else f"{parent.rstrip('/')}/{tail}"

    location, tail = folder.location, relative
    if _URI.match(location):
        head, mark, query = location.partition("?")
        return Location(
            name=below(folder.name, relative),
            location=f"{below(head, quote(relative, safe='/=~'))}{mark}{query}",
            filesystem=folder.filesystem,
            path=below(folder.path, tail),
        )
    return Location(
        name=below(folder.name, relative),
        location=below(location, tail),
        filesystem=folder.filesystem,
        path=below(folder.path, tail),
    )


def _hidden(relative: str) -> bool:
    return any(part.startswith(("_", ".")) for part in relative.split("/"))


def _expand(text: str, option: str) -> Iterator[FoundFile]:
    """The files that one input stands for."""
    is_uri = _URI.match(text) is not None
    wildcard = _URI_GLOB if is_uri else _GLOB
    pattern = urlsplit(text).path if is_uri else os.path.expanduser(text)
    if not wildcard.search(pattern):
        yield from _file_or_folder(locate(text), option)
        return
    if not is_uri and os.path.lexists(pattern):  # a file that is really called a[1].parquet
        yield from _file_or_folder(locate(text), option)
        return
    parts = pattern.split("/")
    first = next(index for index, part in enumerate(parts) if wildcard.search(part))
    base = "/".join(parts[:first])
    if is_uri:
        split = urlsplit(text)
        query = f"?{split.query}" if split.query else ""
        root = locate(f"{split.scheme}://{split.netloc}{base}{query}")
        parts = [unquote(part) for part in parts]
    else:
        root = locate(base or ("/" if pattern.startswith("/") else "."))
    matches = _matcher(parts[first:])
    recursive = len(parts) - first > 1
    folders: list[str] = []
    for relative, info in sorted(_entries(root, recursive=recursive)):
        if any(relative.startswith(f"{folder}/") for folder in folders):
            continue
        if matches(relative):
            if info.type == pafs.FileType.Directory:
                folders.append(relative)
            yield from _file_or_folder(_child(root, relative), option, info)


def _matcher(parts: Sequence[str]) -> Callable[[str], bool]:
    """Whether a relative path matches the pattern's `parts`: `*`, `?` and `[...]` within a part, `**` for any depth.

    As in a shell, a wildcard does not match an entry that begins with `.`; nor one that begins with `_`.
    """

    def match(names: Sequence[str], patterns: Sequence[str]) -> bool:
        if not patterns:
            return not names
        if patterns[0] == "**":
            if match(names, patterns[1:]):
                return True
            return bool(names) and not _hidden(names[0]) and match(names[1:], patterns)
        if not names or not fnmatch.fnmatchcase(names[0], patterns[0]):
            return False
        if _hidden(names[0]) and not _hidden(patterns[0]):
            return False
        return match(names[1:], patterns[1:])

    return lambda relative: match(relative.split("/"), parts)


def _entries(root: Location, *, recursive: bool) -> list[tuple[str, pafs.FileInfo]]:
    """What is below `root`, by path relative to it; nothing where there is no such folder."""
    try:
        infos = root.filesystem.get_file_info(pafs.FileSelector(root.path, recursive=recursive, allow_not_found=True))
    except OSError as error:
        raise InputError(f"cannot list {root.name}: {error}") from error
    prefix = f"{root.path.rstrip('/')}/" if root.path not in ("", ".") else ""
    return [(info.path.removeprefix(prefix), info) for info in infos]


def _file_or_folder(place: Location, option: str, info: pafs.FileInfo | None = None) -> Iterator[FoundFile]:
    if info is None:
        try:
            info = place.filesystem.get_file_info(place.path)
        except OSError as error:
            raise InputError(f"cannot look at {place.name}: {error}") from error
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"{option} {place.name} does not exist: give a parquet file, folder, glob or filesystem URI")
    if info.type != pafs.FileType.Directory:
        yield FoundFile(place=place, size=info.size)
        return
    for relative, entry in _entries(place, recursive=True):
        if entry.type == pafs.FileType.File and not _hidden(relative):
            yield FoundFile(place=_child(place, relative), size=entry.size)
