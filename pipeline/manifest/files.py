"""What a manifest is: its files, its columns and units of its rows, and what a file format has to do. Reads nothing."""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest.row_set import Indices
from pipeline.storage import FileInfo, StorageOptions

MEDIA = "media"
"""The format of a folder of images and videos, which is listed into a Parquet file."""
DIGEST_DIGITS = 16
INDEX_STRIDE = 128
"""Text files: the byte offset of every row whose number is a multiple of this is kept."""


@dataclass(frozen=True, slots=True)
class CsvDialect:
    """How CSV is written."""

    delimiter: str | None = None
    """Between fields; None: a tab in .tsv, elsewhere what the header has most of."""
    quote: str = '"'
    """Around fields; empty: no character quotes."""
    escape: str | None = None
    """Before a quote inside a quoted field; None: the quote is doubled."""


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of the manifest."""

    path: str
    num_rows: int
    size: int
    version: str | None
    """Nanoseconds of the last change on disk, the etag in a bucket."""
    large_groups: tuple[int, ...] = ()
    """Parquet: where each row group begins and ends that is too large to be decoded from its start for every unit."""
    digest: str | None = None
    """Of its content: a text file's as a whole, a Parquet file's end. None where an earlier run recorded none."""

    def section(self, row: int) -> int:
        """How many of these beginnings and ends a row has behind it; odd for a row of a large row group."""
        return bisect.bisect_right(self.large_groups, row)


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """Rows of the manifest's file number `file` that are read and run together."""

    file: int
    path: str
    start: int
    stop: int
    """Row numbers [start, stop) in the file."""
    size: int | None = None
    """The file's, when the manifest was opened; None: unknown, and not compared with the file that is read."""
    version: str | None = None
    """As in ManifestFile; None: unknown, and not compared."""
    seek: tuple[int, int, int] = (0, 0, 1)
    """Text files: a row at or before `start`, the byte at which it begins, and the number of its line, from 1."""
    selected: Indices | None = None
    """The rows among them that are to be run, ascending; None: all."""
    attempts: npt.NDArray[np.int32] | None = None
    """The attempt that this is for each row to run; None: the first."""
    shared: int | None = None
    """Units of a file with the same number here lie in one row group that should be decoded once; None: in no such."""

    @property
    def num_rows(self) -> int:
        """Rows to run."""
        return self.stop - self.start if self.selected is None else len(self.selected)

    @property
    def rows(self) -> Indices:
        """Numbers of the rows to run."""
        return np.arange(self.start, self.stop) if self.selected is None else self.selected


@dataclass(frozen=True)
class ManifestSpec:
    """The part of a manifest that every reader needs: picklable, and small however many files there are."""

    format: str
    schema: pa.Schema
    storage_options: StorageOptions = field(default=None, repr=False)
    csv: CsvDialect = CsvDialect()
    base: str = ""
    partitions: tuple[str, ...] = ()
    """Columns that stand in the names of folders below the base."""


@dataclass(frozen=True)
class Manifest:
    """What a job is to work on. The order of its files is the order of the results."""

    path: str
    format: str
    """A name in `FORMATS`, or `MEDIA`."""
    files: tuple[ManifestFile, ...]
    schema: pa.Schema
    """The columns as found, unified over the files."""
    base: str
    """Folder or bucket prefix against which relative media paths resolve."""
    storage_options: StorageOptions = field(default=None, repr=False, compare=False)
    """For the manifest's own files."""
    offsets: tuple[npt.NDArray[np.int64], ...] = field(default=(), repr=False, compare=False)
    """Text files: (byte offset, line number) of every 128th row of each file."""
    csv: CsvDialect = CsvDialect()
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What people should know about it, such as files that are no part of it; a sentence each."""
    partitions: tuple[str, ...] = ()
    """Columns that stand in the names of folders, the schema's last ones."""

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    @property
    def names(self) -> list[str]:
        """What fingerprints call the files: their paths below the base; a listing, which lies in the run folder and
        moves with it, goes by its own name alone."""
        is_listed = self.format == MEDIA
        return [storage.name(file.path) if is_listed else relative(file.path, self.base) for file in self.files]

    @property
    def spec(self) -> ManifestSpec:
        """What `read_units` needs, to be sent to readers in place of the whole manifest."""
        return ManifestSpec(self.format, self.schema, self.storage_options, self.csv, self.base, self.partitions)

    def unit(self, file: int, start: int, stop: int) -> WorkUnit:
        """The unit of all rows [start, stop) of a file."""
        known = self.files[file]
        section = known.section(start)
        shared = section if section % 2 else None
        unit = WorkUnit(file, known.path, start, stop, known.size, known.version, shared=shared)
        if not self.offsets:
            return unit
        mark = start // INDEX_STRIDE
        offset, line = self.offsets[file][mark].tolist()
        return replace(unit, seek=(mark * INDEX_STRIDE, offset, line))

    def fingerprint(self) -> dict[str, Any]:
        """Names, sizes, row counts and digests: enough to tell whether a later run sees the same rows. Goes into JSON.

        Times of change are left out on purpose: a copied or touched manifest is still the same manifest.
        """
        return {
            "format": self.format,
            "num_rows": self.num_rows,
            "files": [
                [name, file.size, file.num_rows, file.digest] for name, file in zip(self.names, self.files, strict=True)
            ],
        }


class ManifestFormat(ABC):
    """A kind of manifest file. `formats.FORMATS` lists them all."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    """Lower case; a name that ends in one of these is a file of this format."""

    @abstractmethod
    def open(
        self, path: str, base: str, infos: Sequence[FileInfo], options: StorageOptions, csv: CsvDialect
    ) -> Manifest:
        """Count the rows of these files, in this order, and find the columns. Raises ManifestError."""

    @abstractmethod
    def read(self, spec: ManifestSpec, units: Sequence[WorkUnit], columns: Sequence[str]) -> Iterator[pa.Table]:
        """A table for each unit, in the types of `spec.schema`, in one pass over the file.

        The units are of one file, ascending, and whole (no rows `selected`). Columns that the file lacks are null. If
        single rows may be unreadable, the column `schema.MANIFEST_ERROR` has the reason. Raises ManifestError, OSError.
        """


def relative(path: str, base: str) -> str:
    """The path as seen from the base; unchanged where it does not lie below it."""
    return path.removeprefix(base if base.endswith("/") else base + "/")


def refuse_repeated_names(names: Sequence[str], path: str) -> None:
    """Raises ManifestError when two columns have the same name."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ManifestError(f"{path} has several columns of the same name: {', '.join(repeated)}; rename them")


def plain_type(found: pa.DataType) -> pa.DataType:
    """The type in which the values of this one are read: dictionaries as their values, views of text and bytes as
    the usual ones. Files spell one type in several of these ways, and Arrow can't select rows of such views."""
    types = pa.types
    if types.is_dictionary(found):
        return plain_type(found.value_type)
    if types.is_string_view(found) or types.is_binary_view(found):
        return pa.string() if types.is_string_view(found) else pa.binary()
    if types.is_struct(found):
        return pa.struct([inner.with_type(plain_type(inner.type)) for inner in found])
    if types.is_map(found):
        return pa.map_(plain_type(found.key_type), plain_type(found.item_type), found.keys_sorted)
    if types.is_fixed_size_list(found):
        return pa.list_(_plain_items(found), found.list_size)
    for is_kind, make in (
        (types.is_list, pa.list_),
        (types.is_large_list, pa.large_list),
        (types.is_list_view, pa.list_view),
        (types.is_large_list_view, pa.large_list_view),
    ):
        if is_kind(found):
            return make(_plain_items(found))
    return found


def _plain_items(found: pa.DataType) -> pa.Field:
    return found.value_field.with_type(plain_type(found.value_type))


def unify_types(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """A type that holds the values of both, apart from numbers and times beyond its range. Raises pa.ArrowException
    where there is none."""
    schemas = [pa.schema([("", first)]), pa.schema([("", second)])]
    found = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    for each in (first, second):
        if _is_binary(found) and not _is_binary(each) and not pa.types.is_null(each):
            raise pa.ArrowTypeError(f"{each} is text, which {found} is not")  # a path would be taken for a file's bytes
        pa.nulls(1, each).cast(found)  # Arrow lacks some casts to the types that it names
    return found


def _is_binary(found: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_binary(found) or types.is_large_binary(found) or types.is_fixed_size_binary(found))


def check_same_file(unit: WorkUnit, found: FileInfo) -> None:
    """Raises ManifestError where the file that is read is not the one that was there when the manifest was opened."""
    if unit.size is None:
        return
    if found.size != unit.size:
        raise _file_changed(unit, f"has {found.size:,} bytes now but had {unit.size:,}")
    if None not in (found.version, unit.version) and found.version != unit.version:
        raise _file_changed(unit, "has as many bytes, but another time of change or etag than")


def too_few_rows(unit: WorkUnit, num_rows: int) -> ManifestError:
    return _file_changed(unit, f"has {num_rows:,} rows now but had at least {unit.stop:,}")


def _file_changed(unit: WorkUnit, how: str) -> ManifestError:
    return ManifestError(
        f"{unit.path} {how} when the job began: it was changed in the meantime; run the job again, which goes on if "
        "the rows are the same and shows the difference if not"
    )
