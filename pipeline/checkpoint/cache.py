"""A checkpoint or adapter in a bucket, downloaded once per machine; a file lock prevents duplicate downloads.

    <cache_dir>/<name>-<digest>/   config.json  tokenizer.json  model-00001-of-00038.safetensors ...
    <cache_dir>/<name>-<digest>.lock

The digest is of the files' names, sizes and versions, so a checkpoint that changes in its bucket gets a new folder.
Every file is downloaded under a temporary name and renamed once its size is right; files that a killed process has
completed are kept. Local folders and hub names pass through unchanged: the hub's own client caches the latter.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from filelock import FileLock

from pipeline import storage
from pipeline.errors import CheckpointError

DEFAULT_FOLDER = "~/.cache/qwen2-vl-batch"
_WEIGHTS = ".safetensors"
_UNUSED = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""The same weights again, in formats that are not read."""
_STREAMS = 4
_EXPECTED = {
    "model.path": ("config.json", "a checkpoint with its tokenizer"),
    "model.adapter": ("adapter_config.json", "an adapter"),
}
"""The file that a prefix must have besides weights, and what that makes it."""


@dataclass(frozen=True)
class ModelCache:
    """Where a machine keeps checkpoints, and how it reaches the buckets they come from."""

    folder: str = DEFAULT_FOLDER
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def local(self, model_path: str, *, weights: bool) -> str:
        """The checkpoint's folder on this machine, with all its files or (`weights` false) the small ones only.

        Raises CheckpointError when the bucket can't be read, holds no checkpoint, or the disk is too small.
        """
        return self._local(model_path, weights, "model.path")

    def local_adapter(self, path: str) -> str:
        """The same for an adapter, always with its weights."""
        return self._local(path, True, "model.adapter")

    def _local(self, url: str, weights: bool, setting: str) -> str:
        if not storage.is_remote(url):
            return url
        try:
            return self._fetch(url, weights, setting)
        except OSError as error:
            raise CheckpointError(f"{setting} {url} can't be fetched: {error}") from error

    def _fetch(self, url: str, weights: bool, setting: str) -> str:
        files = self._list(url, setting)
        content = "\n".join(f"{file.path} {file.size} {file.version}" for file in files)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        folder = os.path.join(os.path.expanduser(self.folder), f"{storage.name(url)}-{digest}")
        os.makedirs(folder, exist_ok=True)
        wanted = [file for file in files if weights or not file.path.endswith(_WEIGHTS)]
        if _missing(wanted, folder):
            with FileLock(f"{folder}.lock"):
                self._download(_missing(wanted, folder), folder)  # another process may have downloaded some meanwhile
        return folder

    def _list(self, url: str, setting: str) -> list[storage.FileInfo]:
        found = storage.list_files(url, self.storage_options, recursive=False)
        files = [file for file in found if not file.path.endswith(_UNUSED)]
        expected = _EXPECTED[setting]
        names = {storage.name(file.path) for file in files}
        if expected[0] not in names or not any(name.endswith(_WEIGHTS) for name in names):
            shown = ", ".join(sorted(names)[:5]) or "nothing"
            raise CheckpointError(f"{setting} {url} holds {shown}; expected {expected[1]}: {expected[0]}, *{_WEIGHTS}")
        return files

    def _download(self, files: Sequence[storage.FileInfo], folder: str) -> None:
        need, free = sum(file.size for file in files), shutil.disk_usage(folder).free
        if need > free:
            raise CheckpointError(
                f"the checkpoint needs {need / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free: "
                "set model.cache_dir to a larger disk"
            )

        def download(file: storage.FileInfo) -> None:
            storage.download(file, _local_path(file, folder), self.storage_options)

        with ThreadPoolExecutor(_STREAMS) as streams:
            # The largest first, so that the streams finish together; a list, so that errors are raised.
            list(streams.map(download, sorted(files, key=lambda file: -file.size)))


def _local_path(file: storage.FileInfo, folder: str) -> str:
    return os.path.join(folder, storage.name(file.path))


def _missing(files: Sequence[storage.FileInfo], folder: str) -> list[storage.FileInfo]:
    """The files that are not on disk in their full size."""

    def is_complete(file: storage.FileInfo) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.stat(_local_path(file, folder)).st_size == file.size
        return False

    return [file for file in files if not is_complete(file)]
