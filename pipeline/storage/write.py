"""Files that appear whole or not at all, over whatever was there.

On disk a file is written beside its place, synced and renamed; a bucket shows an object once it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from pipeline.storage.buckets import StorageOptions, call
from pipeline.storage.paths import is_remote, local_path

_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


def publish(path: str, data: bytes, storage_options: StorageOptions = None) -> None:
    """Put a file in its place, whole or not at all, over whatever was there."""
    if is_remote(path):
        call(path, storage_options, lambda fs, key: fs.pipe_file(key, data))
        return
    with _synced(local_path(path)) as file:
        file.write(data)


def publish_file(local: str | Path, path: str, storage_options: StorageOptions = None) -> None:
    """Copy a local file to its place, whole or not at all."""
    if is_remote(path):
        call(path, storage_options, lambda fs, key: fs.put_file(str(local), key))
        return
    with open(local, "rb") as source, _synced(local_path(path)) as file:
        shutil.copyfileobj(source, file, 1 << 20)


def create(path: str, data: bytes, storage_options: StorageOptions = None) -> None:
    """Make a file that must not exist yet. Raises FileExistsError.

    A bucket without conditional puts, or whose client has none, overwrites what is there.
    """
    if not is_remote(path):
        with open(local_path(path), "xb") as file:
            file.write(data)
        return
    try:
        call(path, storage_options, lambda fs, key: fs.pipe_file(key, data, mode="create"))
    except FileExistsError:
        raise
    except OSError as error:
        response = getattr(error.__cause__, "response", None)
        if isinstance(response, Mapping) and response.get("Error", {}).get("Code") in ("PreconditionFailed", "412"):
            raise FileExistsError(errno.EEXIST, "there is one already", path) from error
        publish(path, data, storage_options)  # any other fault appears again


def make_dir(path: str, storage_options: StorageOptions = None) -> None:
    """Make a folder and those above it. Buckets need none."""
    if not is_remote(path):
        os.makedirs(local_path(path), exist_ok=True)


def delete(path: str, storage_options: StorageOptions = None, *, recursive: bool = False) -> None:
    """Remove a file, or with `recursive` a folder; a missing one is fine."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            call(path, storage_options, lambda fs, key: fs.rm(key, recursive=recursive))
        elif recursive and os.path.isdir(local_path(path)) and not os.path.islink(local_path(path)):
            shutil.rmtree(local_path(path))
        else:
            os.unlink(local_path(path))


def delete_empty(path: str) -> None:
    """Remove a folder on disk if nothing is in it. Buckets have no empty folders."""
    if not is_remote(path):
        with contextlib.suppress(OSError):
            os.rmdir(local_path(path))


def sweep(path: str) -> None:
    """Remove what killed writers left below a folder on disk. The caller must be the only writer there.

    Writes to a bucket leave nothing behind.
    """
    if is_remote(path):
        return
    for folder, _, names in os.walk(local_path(path)):
        for name in filter(_TEMPORARY.fullmatch, names):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))


@contextlib.contextmanager
def replaced(path: str) -> Iterator[str]:
    """A temporary name beside a local path, renamed to it when the block succeeds; hidden, so that nothing lists it."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _synced(path: str) -> Iterator[BinaryIO]:
    """A file to write in place of a local one, which survives a power cut once the block has ended."""
    with replaced(path) as temporary, open(temporary, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    # The rename itself lasts only once the folder is synced.
    descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks can't sync folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
