"""A checkpoint in a bucket, on this machine's disk: downloaded once a machine, however many processes ask.

    <cache_dir>/<name>-<what the bucket holds>/   config.json  tokenizer.json  model-00001-of-00038.safetensors ...
    <cache_dir>/<name>-<what the bucket holds>.lock

The folder's name follows from the files' names, sizes and versions, so a checkpoint that changes in its bucket gets a
folder of its own. Every file is downloaded beside its place and renamed once its size is right: what a killed process
leaves is gone on with by the next. Hub names and local folders pass through as they are (the hub's own client caches).
Knows files; not what is in them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage
from pipeline.errors import CheckpointError

DEFAULT_FOLDER = "~/.cache/qwen2-vl-batch"
_WEIGHTS = ".safetensors"
_UNUSED = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""The same weights again, in forms that are not read."""
_STREAMS = 4


@dataclass(frozen=True)
class ModelCache:
    """Where a machine keeps checkpoints, and how it reaches the buckets they come from."""

    folder: str = DEFAULT_FOLDER
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def local(self, model_path: str, *, weights: bool) -> str:
        """The checkpoint's folder on this machine, all of it or (`weights` false) its small files alone.

        Raises CheckpointError when the bucket can't be read, holds no checkpoint, or the disk is too small.
        """
        if not storage.is_remote(model_path):
            return model_path
        try:
            return self._fetch(model_path, weights)
        except OSError as error:
            raise CheckpointError(f"model.path {model_path} can't be fetched: {error}") from error

    def _fetch(self, url: str, weights: bool) -> str:
        files = self._list(url)
        wanted = [file for file in files if weights or not file.path.endswith(_WEIGHTS)]
        folder = os.path.join(os.path.expanduser(self.folder), _folder_name(url, files))
        os.makedirs(folder, exist_ok=True)
        missing = _missing(wanted, folder)
        if missing:
            with _locked(f"{folder}.lock"):
                missing = _missing(wanted, folder)  # another process may have brought them while this one waited
                self._download(missing, folder)
        return folder

    def _list(self, url: str) -> list[storage.FileInfo]:
        found = storage.list_files(url, self.storage_options, recursive=False)
        files = [file for file in found if not file.path.endswith(_UNUSED)]
        names = {storage.name(file.path) for file in files}
        if "config.json" not in names or not any(name.endswith(_WEIGHTS) for name in names):
            shown = ", ".join(sorted(names)[:5]) or "nothing"
            raise CheckpointError(
                f"model.path {url} holds {shown}; expected a checkpoint: config.json and *{_WEIGHTS}, tokenizer beside"
            )
        return files

    def _download(self, files: Sequence[storage.FileInfo], folder: str) -> None:
        need, free = sum(file.size for file in files), shutil.disk_usage(folder).free
        if need > free:
            raise CheckpointError(
                f"the checkpoint needs {need / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free: "
                "set model.cache_dir to a larger disk"
            )
        with ThreadPoolExecutor(_STREAMS) as streams:
            # The largest first, so that no stream is left with a big one at the end.
            for _ in streams.map(
                lambda file: storage.download(file, _place(file, folder), self.storage_options),
                sorted(files, key=lambda file: -file.size),
            ):
                pass


def _folder_name(url: str, files: Sequence[storage.FileInfo]) -> str:
    content = "\n".join(f"{file.path} {file.size} {file.version}" for file in files)
    return f"{storage.name(url)}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _place(file: storage.FileInfo, folder: str) -> str:
    return os.path.join(folder, storage.name(file.path))


def _missing(files: Sequence[storage.FileInfo], folder: str) -> list[storage.FileInfo]:
    def there(file: storage.FileInfo) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.stat(_place(file, folder)).st_size == file.size
        return False

    return [file for file in files if not there(file)]


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Alone among this machine's processes; a dead one's lock ends with it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
