"""The manifest as found, its files and the units of rows that readers are handed. Knows nothing of reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.storage import StorageOptions

ManifestFormat: TypeAlias = Literal["parquet", "jsonl", "csv", "media"]

ERROR_COLUMN = "_manifest_error"
"""Added to the rows of JSONL and CSV files: why the line can't be read; null where it can."""

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".avif")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")

INDEX_STRIDE = 128
"""Text files: the byte offset of every row whose number is a multiple of this is kept."""


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of the manifest."""

    path: str
    num_rows: int
    size: int
    version: str | None
    """Nanoseconds of the last change on disk, the etag in a bucket."""


class ReadSpec(Protocol):
    """What reading a unit needs besides the unit. A Manifest has it; `Manifest.spec` is it, small enough to send."""

    @property
    def format(self) -> ManifestFormat: ...
    @property
    def schema(self) -> pa.Schema: ...
    @property
    def storage_options(self) -> StorageOptions: ...


@dataclass(frozen=True)
class ManifestSpec:
    """The part of a manifest that every reader needs: picklable, and small however many files there are."""

    format: ManifestFormat
    schema: pa.Schema
    storage_options: StorageOptions = field(default=None, repr=False)


@dataclass(frozen=True)
class Manifest:
    """What a job is to work on. Its files' order is the order of the results."""

    path: str
    format: ManifestFormat
    files: tuple[ManifestFile, ...]
    schema: pa.Schema
    """The columns as found, unified over the files, without `_manifest_error`."""
    base: str
    """Folder or bucket prefix against which relative media paths resolve."""
    storage_options: StorageOptions = field(default=None, repr=False, compare=False)
    """For the manifest's own files."""
    offsets: tuple[npt.NDArray[np.int64], ...] = field(default=(), repr=False, compare=False)
    """Text files: byte offsets of every 128th row of each file."""

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    @property
    def spec(self) -> ManifestSpec:
        """What `read_unit` needs, to be sent to readers in place of the whole manifest."""
        return ManifestSpec(self.format, self.schema, self.storage_options)

    def fingerprint(self) -> dict[str, Any]:
        """Names, sizes and row counts: enough to tell whether a later run sees the same rows. Goes into JSON.

        Times of change are left out on purpose: a copied or touched manifest is still the same manifest.
        """
        return {
            "format": self.format,
            "num_rows": self.num_rows,
            "files": [[relative(file.path, self.base), file.size, file.num_rows] for file in self.files],
        }


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """Rows [start, stop) of the manifest's file number `file`."""

    file: int
    path: str
    start: int
    stop: int
    seek: tuple[int, int] = (0, 0)
    """Text files: a row at or before `start`, and the byte at which it begins."""

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


def unit_of(manifest: Manifest, number: int, start: int, stop: int) -> WorkUnit:
    """The unit of rows [start, stop) of file `number`."""
    return WorkUnit(number, manifest.files[number].path, start, stop, _seek(manifest, number, start))


def _seek(manifest: Manifest, number: int, row: int) -> tuple[int, int]:
    if not manifest.offsets:
        return (0, 0)
    mark = row // INDEX_STRIDE
    return mark * INDEX_STRIDE, int(manifest.offsets[number][mark])


def kind_of(path: str) -> str:
    lowered = storage.name(path).lower()
    for kind, suffixes in SUFFIXES.items():
        if lowered.endswith(suffixes):
            return "other" if lowered.startswith("_") else kind
    return "media" if lowered.endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES) else "other"


def relative(path: str, base: str) -> str:
    """The path as seen from the base; unchanged where it does not lie below it."""
    prefix = base if base.endswith("/") else base + "/"
    return path.removeprefix(prefix)


def changed(unit: WorkUnit, num_rows: int) -> ManifestError:
    return ManifestError(
        f"{unit.path} has {num_rows} rows now but had at least {unit.stop} when the job began: "
        "it was changed meanwhile; run the job again to see the difference"
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
