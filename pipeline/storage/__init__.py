"""A path on disk or in a bucket: open, list, publish atomically.

Local paths go straight to the operating system; any other URL (`s3://`, `gs://`, `hf://`, `memory://`, ...) goes
through fsspec with the caller's `storage_options`. Whatever goes wrong is an OSError here (FileNotFoundError,
PermissionError, StorageError); callers say what it means to them. Knows no formats and no rows.

Nobody ever sees half a file: on disk a file is written beside its place, synced and renamed; a bucket shows an
object once it is whole. Names that begin with a dot are temporary or hidden and never listed.
"""

from __future__ import annotations

import contextlib
import errno
import glob as local_glob
import io
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar, cast

from pipeline.storage.credentials import credential_fault

StorageOptions: TypeAlias = Mapping[str, Any] | None
Result = TypeVar("Result")

ATTEMPTS = 5
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""URL scheme to the extra of this package that brings its file system."""

_READ_BUFFER = 1 << 20
_GLOB_MAGIC = frozenset("*?[")
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")
_TRANSIENT_ERRNO = {
    errno.EBUSY, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ECONNABORTED, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH,
    getattr(errno, "EREMOTEIO", errno.EIO),  # s3fs for a server's internal error; macOS has none
}  # fmt: skip
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    "slowdown", "throttling", "throttlingexception", "requesttimeout", "internalerror", "serviceunavailable",
    "requestlimitexceeded", "toomanyrequests", "priorrequestnotcomplete", "500", "502", "503", "504",
}  # fmt: skip
# Client libraries raise their own kinds for a lost connection; known by name, so that none has to be installed.
_TRANSIENT_NAMES = {
    "ClientConnectionError", "ClientPayloadError", "ConnectTimeoutError", "ConnectionClosedError",
    "EndpointConnectionError", "FSTimeoutError", "HTTPClientError", "IncompleteRead", "IncompleteReadError",
    "ReadTimeoutError", "ResponseStreamingError", "ServerDisconnectedError", "TransportError",
}  # fmt: skip


class StorageError(OSError):
    """The path can't be used. The message is one line."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What a listing knows of a file."""

    path: str
    size: int
    version: str | None
    """Changes when the content does: nanoseconds of the last change on disk, the etag in a bucket."""


# ---------------------------------------------------------------------------------------------------------------------
# Paths


def is_remote(path: str) -> bool:
    """Whether the path is a URL of something other than this machine's disk."""
    scheme, separator, _ = path.partition("://")
    return bool(separator) and scheme not in ("file", "local")


def local_path(path: str) -> str:
    """A local path without its `file://`; a leading `~` is the home folder."""
    for prefix in ("file://", "local://"):
        path = path.removeprefix(prefix)
    return os.path.expanduser(path)


def absolute(path: str) -> str:
    """The path as any process on this machine can use it; URLs and the empty path unchanged."""
    return path if is_remote(path) or not path else os.path.abspath(local_path(path))


def join(base: str, *names: str) -> str:
    """`base/name/...`, for URLs and local paths alike."""
    path = base
    for name in names:
        path = path + name if path.endswith("/") or not path else f"{path}/{name}"
    return path


def parent(path: str) -> str:
    """The folder or prefix that holds the path: `s3://bucket` for `s3://bucket/file`, `.` for `file`."""
    if is_remote(path):
        scheme, _, rest = path.partition("://")
        return f"{scheme}://{rest.rstrip('/').rpartition('/')[0]}"
    return os.path.dirname(local_path(path).rstrip("/")) or ("/" if path.startswith("/") else ".")


def name(path: str) -> str:
    """The last part of the path."""
    return path.rstrip("/").rpartition("/")[2]


def is_glob(path: str) -> bool:
    """Whether the path has a wildcard: `*`, `?` or `[`."""
    return not _GLOB_MAGIC.isdisjoint(path)


def glob_base(path: str) -> str:
    """The folder above the first wildcard."""
    fixed = path[: min(path.index(magic) for magic in _GLOB_MAGIC if magic in path)]
    return parent(fixed + "x")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def exists(path: str, storage_options: StorageOptions = None) -> bool:
    """Whether there is a file, folder or prefix of this name."""
    if not is_remote(path):
        return os.path.exists(local_path(path))
    return _remote_entry(path, storage_options) is not None


def is_dir(path: str, storage_options: StorageOptions = None) -> bool:
    """Whether the path is a folder, or a prefix with objects below it."""
    if not is_remote(path):
        return os.path.isdir(local_path(path))
    entry = _remote_entry(path, storage_options)
    return entry is not None and entry["type"] == "directory"


def file_info(path: str, storage_options: StorageOptions = None) -> FileInfo:
    """Size and version of one file. Raises FileNotFoundError."""
    if not is_remote(path):
        status = os.stat(local_path(path))
        return FileInfo(path, status.st_size, str(status.st_mtime_ns))
    fs, key = _filesystem(path, storage_options)
    return _remote_info(path, _retrying(lambda: fs.info(key), path))


def open_input(path: str, storage_options: StorageOptions = None, *, random_access: bool = False) -> BinaryIO:
    """The file, open for reading and seekable; lost connections are taken up again where they broke.

    `random_access` tells a bucket's client not to read ahead, which suits formats that jump to what they need.
    """
    if not is_remote(path):
        return open(local_path(path), "rb")
    fs, key = _filesystem(path, storage_options)
    cache = "none" if random_access else "readahead"

    def open_remote() -> Any:
        try:
            return fs.open(key, "rb", cache_type=cache)
        except TypeError:  # a file system without caches of its own
            return fs.open(key, "rb")

    raw = _RetryingReader(_retrying(open_remote, path), path)
    return cast(BinaryIO, io.BufferedReader(raw, buffer_size=8192 if random_access else _READ_BUFFER))


def read_bytes(path: str, storage_options: StorageOptions = None) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    if not is_remote(path):
        return Path(local_path(path)).read_bytes()
    fs, key = _filesystem(path, storage_options)
    return bytes(_retrying(lambda: fs.cat_file(key), path))


def download(file: FileInfo, local: str, storage_options: StorageOptions = None) -> None:
    """Copy a file to a place on disk, whole or not at all. Raises StorageError when its size is not the listing's."""
    temporary = _temporary(local)
    try:
        if is_remote(file.path):
            fs, key = _filesystem(file.path, storage_options)
            _retrying(lambda: fs.get_file(key, temporary), file.path)
        else:
            shutil.copyfile(local_path(file.path), temporary)
        size = os.stat(temporary).st_size
        if size != file.size:
            raise StorageError(f"{file.path}: {size:,} bytes came; the listing says {file.size:,}")
        os.replace(temporary, local)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def list_files(prefix: str, storage_options: StorageOptions = None, *, recursive: bool = True) -> list[FileInfo]:
    """Files below a folder or prefix, sorted by path; a missing one has none. Hidden files and folders are left out."""
    if not is_remote(prefix):
        found = list(_walk(prefix, local_path(prefix) or ".", recursive, ()))
    else:
        fs, key = _filesystem(prefix, storage_options)
        found = []
        depth = {} if recursive else {"maxdepth": 1}
        entries: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError):
            entries = _retrying(lambda: fs.find(key, detail=True, **depth), prefix)
        for entry_key, entry in entries.items():
            relative = entry_key.removeprefix(key).lstrip("/")
            # A bucket's consoles make "folders" by putting empty objects whose names end in a slash.
            if entry.get("type") != "directory" and relative and not relative.endswith("/") and not _hidden(relative):
                found.append(_remote_info(join(prefix, relative), entry))
    return sorted(found, key=lambda info: info.path)


def glob(pattern: str, storage_options: StorageOptions = None) -> list[FileInfo]:
    """Files that match a pattern with `*`, `?`, `[...]` or `**`, sorted by path; hidden ones are left out."""
    base = glob_base(pattern)
    if not is_remote(pattern):
        paths = local_glob.glob(local_path(pattern), recursive=True)
        found = [file_info(path) for path in paths if os.path.isfile(path)]
    else:
        fs, key = _filesystem(pattern, storage_options)
        _, base_key = _filesystem(base, storage_options)
        found = [
            _remote_info(join(base, entry_key.removeprefix(base_key).lstrip("/")), entry)
            for entry_key, entry in _retrying(lambda: fs.glob(key, detail=True), pattern).items()
            if entry.get("type") != "directory"
        ]
    below = len(base.rstrip("/")) + 1 if base != "." else 0
    return sorted((info for info in found if not _hidden(info.path[below:])), key=lambda info: info.path)


def _walk(shown: str, folder: str, recursive: bool, above: tuple[tuple[int, int], ...]) -> Iterator[FileInfo]:
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
        if entry.is_dir():
            if recursive:
                yield from _walk(path, entry.path, True, (*above, identity))
        elif entry.is_file():
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                entry_status = entry.stat()
                yield FileInfo(path, entry_status.st_size, str(entry_status.st_mtime_ns))


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def _remote_entry(path: str, storage_options: StorageOptions) -> Mapping[str, Any] | None:
    """What the bucket says of a file or prefix; None where there is none.

    fsspec's own `exists` and `isdir` take a lost connection for a missing file.
    """
    fs, key = _filesystem(path, storage_options)
    try:
        return cast(Mapping[str, Any], _retrying(lambda: fs.info(key), path))
    except FileNotFoundError:
        return None


def _remote_info(path: str, entry: Mapping[str, Any]) -> FileInfo:
    version = None
    for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "updated", "created"):
        if found := entry.get(key):
            # The same time comes as a number or a datetime, depending on the call.
            version = str(found.timestamp() if hasattr(found, "timestamp") else found).strip('"')
            break
    return FileInfo(path, int(entry.get("size") or 0), version)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def publish(path: str, data: bytes, storage_options: StorageOptions = None) -> None:
    """Put a file in its place, whole or not at all, over whatever was there."""
    if not is_remote(path):
        _publish_local(local_path(path), lambda file: file.write(data))
        return
    fs, key = _filesystem(path, storage_options)
    _retrying(lambda: fs.pipe_file(key, data), path)


def create(path: str, data: bytes, storage_options: StorageOptions = None) -> None:
    """Make a file that must not be there yet. Raises FileExistsError; a bucket that knows no conditional puts, or
    whose client knows none, overwrites what is there."""
    if not is_remote(path):
        with open(local_path(path), "xb") as file:
            file.write(data)
        return
    fs, key = _filesystem(path, storage_options)
    try:
        _retrying(lambda: fs.pipe_file(key, data, mode="create"), path)
    except FileExistsError:
        raise
    except OSError as error:
        answer = getattr(error.__cause__, "response", None)
        if isinstance(answer, Mapping) and answer.get("Error", {}).get("Code") in ("PreconditionFailed", "412"):
            raise FileExistsError(errno.EEXIST, "there is one already", path) from error
        _retrying(lambda: fs.pipe_file(key, data), path)  # whatever else is wrong shows again


def publish_file(local: str | Path, path: str, storage_options: StorageOptions = None) -> None:
    """Copy a local file to its place, whole or not at all."""
    if not is_remote(path):
        with open(local, "rb") as source:
            _publish_local(local_path(path), lambda file: shutil.copyfileobj(source, file, _READ_BUFFER))
        return
    fs, key = _filesystem(path, storage_options)
    _retrying(lambda: fs.put_file(str(local), key), path)


def make_dir(path: str, storage_options: StorageOptions = None) -> None:
    """Make a folder and those above it. Buckets have none to make."""
    if not is_remote(path):
        os.makedirs(local_path(path), exist_ok=True)


def delete(path: str, storage_options: StorageOptions = None, *, recursive: bool = False) -> None:
    """Remove a file, or with `recursive` a folder; what is missing already is fine."""
    if not is_remote(path):
        target = local_path(path)
        with contextlib.suppress(FileNotFoundError):
            if recursive and os.path.isdir(target) and not os.path.islink(target):
                shutil.rmtree(target)
            else:
                os.unlink(target)
        return
    fs, key = _filesystem(path, storage_options)
    with contextlib.suppress(FileNotFoundError):
        _retrying(lambda: fs.rm(key, recursive=recursive), path)


def sweep(path: str) -> None:
    """Remove what writers that were killed left below a folder on disk. For whoever alone may write there. A bucket's
    puts leave nothing."""
    if is_remote(path):
        return
    for folder, _, names in os.walk(local_path(path)):
        for name in names:
            if _TEMPORARY.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name))


def _temporary(path: str) -> str:
    """A name beside `path` for what is not whole yet; hidden, so that no listing shows it."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _publish_local(path: str, write: Callable[[BinaryIO], object]) -> None:
    folder, temporary = os.path.dirname(path), _temporary(path)
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    # The rename itself lasts through a power cut only once the folder is synced.
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks can't sync folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Buckets


def _filesystem(path: str, storage_options: StorageOptions) -> tuple[Any, str]:
    """The path's file system and its key there. fsspec keeps one for each set of options."""
    import fsspec

    scheme = path.partition("://")[0]
    # Other processes write to the same folders, so that a remembered listing is soon a wrong one.
    options = {"use_listings_cache": False, **(storage_options or {})}
    try:
        fs, key = fsspec.core.url_to_fs(path, **options)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        hint = f"pip install 'qwen2-vl-batch[{extra}]'" if extra else _first_line(error)
        raise StorageError(f"can't open {path}: the file system for {scheme}:// is not installed; {hint}") from error
    except ValueError as error:
        raise StorageError(f"can't open {path}: {_first_line(error)}") from error
    return fs, key.rstrip("/") if isinstance(key, str) else key


class _RetryingReader(io.RawIOBase):
    """Reads from a remote file; after a lost connection it goes on from the same byte."""

    def __init__(self, file: Any, path: str) -> None:
        self._file = file
        self._path = path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        position = self._file.tell()

        def read() -> bytes:
            self._file.seek(position)
            return bytes(self._file.read(len(buffer)))

        data = _retrying(read, self._path)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _retrying(operation: Callable[[], Result], path: str) -> Result:
    """The operation's result. Transient errors are tried again with growing, jittered pauses; others become OSError."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation()
        except Exception as error:
            fault = credential_fault(error)
            if fault is not None:
                raise StorageError(f"{path}: {fault}") from error
            if attempt < ATTEMPTS and is_transient(error):
                # Full jitter: many workers that failed together must not come back together.
                time.sleep(random.uniform(0.1, 1.0) * min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt))
                continue
            if isinstance(error, OSError) and not is_transient(error):
                raise
            tries = f" (tried {attempt} times)" if attempt > 1 else ""
            raise StorageError(f"{path}: {type(error).__name__}: {_first_line(error)}{tries}") from error
    raise AssertionError("unreachable")


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: lost connections, timeouts, throttling, the server's own faults."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if any(kind.__name__ in _TRANSIENT_NAMES for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    status = getattr(error, "status", None) or getattr(error, "code", None)
    response = getattr(error, "response", None)  # botocore's ClientError
    if isinstance(response, Mapping):
        status = status or response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if str(response.get("Error", {}).get("Code", "")).lower() in _TRANSIENT_CODES:
            return True
    try:
        return int(status) in _TRANSIENT_STATUS  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
