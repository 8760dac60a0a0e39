"""Files and folders as they are: open, read, list, download.

Names that begin with a dot are temporary or hidden and never listed.
"""

from __future__ import annotations

import contextlib
import glob as local_glob
import io
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline.storage.buckets import StorageError, StorageOptions, call, file_system
from pipeline.storage.paths import glob_base, is_remote, join, local_path
from pipeline.storage.write import replaced


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What a listing knows of a file."""

    path: str
    size: int
    version: str | None
    """Changes when the content does: nanoseconds of the last change on disk, the etag in a bucket."""


def exists(path: str, storage_options: StorageOptions = None) -> bool:
    """Whether there is a file, folder or prefix of this name."""
    if not is_remote(path):
        return os.path.exists(local_path(path))
    return _remote_type(path, storage_options) is not None


def is_dir(path: str, storage_options: StorageOptions = None) -> bool:
    """Whether the path is a folder, or a prefix with objects below it."""
    if not is_remote(path):
        return os.path.isdir(local_path(path))
    return _remote_type(path, storage_options) == "directory"


def file_info(path: str, storage_options: StorageOptions = None) -> FileInfo:
    """Size and version of one file. Raises FileNotFoundError."""
    if not is_remote(path):
        return _local_info(path, os.stat(local_path(path)))
    return _remote_info(path, call(path, storage_options, lambda fs, key: fs.info(key)))


def read_bytes(path: str, storage_options: StorageOptions = None) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    if not is_remote(path):
        return Path(local_path(path)).read_bytes()
    return bytes(call(path, storage_options, lambda fs, key: fs.cat_file(key)))


def read_tail(file: FileInfo, num_bytes: int, storage_options: StorageOptions = None) -> bytes:
    """The last bytes of a file of a listing, in one request; all of a shorter file."""
    start = max(0, file.size - num_bytes)
    if is_remote(file.path):  # a bucket refuses to send a part of an empty file
        return bytes(
            call(file.path, storage_options, lambda fs, key: fs.cat_file(key, start=start) if file.size else b"")
        )
    with open(local_path(file.path), "rb") as opened:
        opened.seek(start)
        return opened.read()


def open_input(path: str, storage_options: StorageOptions = None, *, random_access: bool = False) -> BinaryIO:
    """The file, open for reading and seekable; after a lost connection, reading goes on from the same byte.

    `random_access` turns off a bucket client's reading ahead, for formats that jump to what they need.
    """
    if not is_remote(path):
        return open(local_path(path), "rb")

    def open_remote(fs: Any, key: str) -> Any:
        try:
            return fs.open(key, "rb", cache_type="none" if random_access else "readahead")
        except TypeError:  # a file system without caches of its own
            return fs.open(key, "rb")

    file = call(path, storage_options, open_remote)
    cache: Any = getattr(file, "cache", None)
    if hasattr(cache, "fetcher"):  # fsspec's own buffered files: all that they read comes through this function
        fetch = cache.fetcher
        cache.fetcher = lambda start, end: call(path, storage_options, lambda fs, key: fetch(start, end))
    return cast(BinaryIO, io.BufferedReader(file, buffer_size=8192 if random_access else 1 << 20))


def opened_info(file: Any, path: str, storage_options: StorageOptions = None) -> FileInfo:
    """Size and version of a file that is open: without a request where a bucket's client knows them from opening it."""
    if not is_remote(path):
        return _local_info(path, os.fstat(file.fileno()))

    def details(fs: Any, key: str) -> Any:
        known = getattr(file.raw, "details", None) or {}
        return known if known.get("size") is not None else fs.info(key)

    return _remote_info(path, call(path, storage_options, details))


def download(file: FileInfo, local: str, storage_options: StorageOptions = None) -> None:
    """Copy a file to a place on disk, whole or not at all. Raises StorageError when its size is not the listing's."""
    with replaced(local) as temporary:
        if is_remote(file.path):
            call(file.path, storage_options, lambda fs, key: fs.get_file(key, temporary))
        else:
            shutil.copyfile(local_path(file.path), temporary)
        size = os.stat(temporary).st_size
        if size != file.size:
            raise StorageError(f"{file.path}: {size:,} bytes came; the listing says {file.size:,}")


def list_files(
    prefix: str, storage_options: StorageOptions = None, *, recursive: bool = True, dangling: bool = False
) -> list[FileInfo]:
    """Files below a folder or prefix, sorted by path; a missing one has none. Hidden files and folders are left out.

    With `dangling`, links to files that are not there are files too.
    """
    if not is_remote(prefix):
        return _visible(_walk(prefix, local_path(prefix) or ".", recursive, dangling, ()), prefix)
    depth = {} if recursive else {"maxdepth": 1}
    entries: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        entries = call(prefix, storage_options, lambda fs, key: fs.find(key, detail=True, **depth))
    return _visible(_remote_files(prefix, storage_options, entries), prefix)


def glob(pattern: str, storage_options: StorageOptions = None, *, dangling: bool = False) -> list[FileInfo]:
    """Files that match a pattern with `*`, `?`, `[...]` or `**`, as in `list_files`."""
    base = glob_base(pattern)
    if not is_remote(pattern):
        paths = local_glob.glob(local_path(pattern), recursive=True)
        return _visible(filter(None, (_listed(path, path, dangling) for path in paths)), "" if base == "." else base)
    entries = call(pattern, storage_options, lambda fs, key: fs.glob(key, detail=True))
    return _visible(_remote_files(base, storage_options, entries), base)


def _walk(
    shown: str, folder: str, recursive: bool, dangling: bool, above: tuple[tuple[int, int], ...]
) -> Iterator[FileInfo]:
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link that leads back up
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = join(shown, entry.name)
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
            if recursive:
                yield from _walk(path, entry.path, True, dangling, (*above, identity))
        elif info := _listed(path, entry.path, dangling):
            yield info


def _listed(shown: str, path: str, dangling: bool) -> FileInfo | None:
    """The file at a path of a listing; None where there is none any more, or only a pipe or device."""
    try:
        status = os.stat(path)
    except OSError as error:
        if os.path.islink(path):  # to nothing, or to itself
            return _local_info(shown, os.lstat(path)) if dangling else None
        if isinstance(error, FileNotFoundError):
            return None
        raise
    return _local_info(shown, status) if stat.S_ISREG(status.st_mode) else None


def _remote_files(
    base: str, storage_options: StorageOptions, entries: Mapping[str, Mapping[str, Any]]
) -> Iterator[FileInfo]:
    """Entries of a listing by key, with paths as the caller writes them."""
    _, base_key = file_system(base, storage_options)
    for key, entry in entries.items():
        relative = key.removeprefix(base_key).removeprefix("/")  # one slash: keys may hold several in a row
        # A bucket's consoles make "folders" by putting empty objects whose names end in a slash.
        if entry.get("type") != "directory" and relative and not relative.endswith("/"):
            yield _remote_info(join(base, relative), entry)


def _visible(files: Iterator[FileInfo], base: str) -> list[FileInfo]:
    """Files without a hidden name below the base, sorted by path."""
    start = len(base.rstrip("/")) + 1 if base else 0
    return sorted(
        (file for file in files if not any(part.startswith(".") for part in file.path[start:].split("/"))),
        key=lambda file: file.path,
    )


def _remote_type(path: str, storage_options: StorageOptions) -> str | None:
    """`file` or `directory`; None where there is neither.

    fsspec's own `exists` and `isdir` take a lost connection for a missing file.
    """
    try:
        return str(call(path, storage_options, lambda fs, key: fs.info(key))["type"])
    except FileNotFoundError:
        return None


def _local_info(path: str, status: os.stat_result) -> FileInfo:
    return FileInfo(path, status.st_size, str(status.st_mtime_ns))


def _remote_info(path: str, entry: Mapping[str, Any]) -> FileInfo:
    version = None
    for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "updated", "created"):
        if found := entry.get(key):
            # The same time comes as a number or a datetime, depending on the call.
            version = str(found.timestamp() if hasattr(found, "timestamp") else found).strip('"')
            break
    return FileInfo(path, int(entry.get("size") or 0), version)
