"""What text formats share: every file is read once to count rows, note offsets and decide the columns' types."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import itertools
import json
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.errors import ManifestError, first_line
from pipeline.manifest.files import (
    DIGEST_DIGITS,
    INDEX_STRIDE,
    CsvDialect,
    Manifest,
    ManifestFile,
    ManifestFormat,
    ManifestSpec,
    WorkUnit,
    check_same_file,
    too_few_rows,
    unify_types,
)
from pipeline.schema import MANIFEST_ERROR
from pipeline.storage import FileInfo, StorageOptions

_LOOKED_AT_BYTES = 64 * 1024
_NOT_TEXT = (
    (b"\xff\xfe", "UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16; save it as UTF-8"),
    (b"PAR1", "a Parquet file by its first bytes; name it .parquet or set input.format"),
    (b"PK\x03\x04", "a ZIP archive, as Excel's workbooks are; save it as CSV"),
    (b"\x1f\x8b", "gzipped twice; unpack it once"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard; unpack it, or compress it by gzip"),
    (b"BZh", "compressed by bzip2; unpack it, or compress it by gzip"),
    (b"\xfd7zXZ\x00", "compressed by xz; unpack it, or compress it by gzip"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
)
"""(how files begin, what they are)"""
_BOM = b"\xef\xbb\xbf"
_JSON_ALWAYS = frozenset({"messages"})
"""Columns that are JSON text whatever their values are."""
_LARGEST_EXACT = 2**53
"""Integers beyond it, of the kind `long`, can't all be held as floats."""
_SCALARS = {
    "bool": pa.bool_(),
    "int": pa.int64(),
    "long": pa.int64(),
    "float": pa.float64(),
    "str": pa.string(),
}
_TYPES = {
    **_SCALARS,
    **{f"list {name}": pa.list_(type) for name, type in _SCALARS.items()},
    "list": pa.list_(pa.null()),
}


class Record(NamedTuple):
    """One row of a text file."""

    offset: int
    """Byte at which it begins."""
    line: int
    """The number of its first line, from 1."""
    values: dict[str, Any] | None
    error: str | None = None
    """Why it has no values."""


class Lines:
    """Lines of a file as text. `offset` is the byte at which the next line begins, `number` its number."""

    def __init__(self, file: BinaryIO, start: int = 0, number: int = 1) -> None:
        file.seek(start)
        self._file = file
        self.offset, self.number = start, number
        self.error: str | None = None
        """Why a line since the last reset is not text."""

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        text = line.removeprefix(_BOM) if self.offset == 0 else line
        self.offset += len(line)
        self.number += 1
        try:
            return text.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            self.error = f"line {self.number - 1} is not UTF-8: {first_line(error)}"
            return text.decode("utf-8", "replace")


class TextFormat(ManifestFormat):
    """Rows one after the other, each beginning at a byte from which reading can start. Files may be gzipped."""

    @abstractmethod
    def records(self, path: str, file: BinaryIO, dialect: CsvDialect, start: tuple[int, int]) -> Iterator[Record]:
        """The rows from a byte and line on, which are (0, 1) or the beginning of a row."""

    def header(self, path: str, file: BinaryIO, dialect: CsvDialect) -> Sequence[str]:
        """Columns that the file names once, for all rows, whose values are text. Empty when each row names its own."""
        return ()

    def likely_form(self, first: str) -> str | None:
        """What a file is whose first line, which is this, can't be read; None if that is hard to say."""
        return None

    def open(
        self, path: str, base: str, infos: Sequence[FileInfo], options: StorageOptions, csv: CsvDialect
    ) -> Manifest:
        kinds: dict[str, set[str]] = {}
        files, offsets, unread = [], [], []
        for info in infos:
            num_rows, num_read, marks = 0, 0, []
            with _open_text(info.path, options) as text:
                file = _Digested(text)
                header = self.header(info.path, file, csv)
                kinds |= {name: {"str"} for name in header}
                for record in self.records(info.path, file, csv, (0, 1)):
                    if num_rows % INDEX_STRIDE == 0:
                        marks.append((record.offset, record.line))
                    num_rows += 1
                    num_read += record.error is None
                    if record.values and not header:
                        for name, value in record.values.items():
                            found = kinds.setdefault(name, set())
                            if value is not None:
                                found.add(_kind(value))
                digest = file.digest
                if num_read * 2 < num_rows and not header:
                    first = next(self.records(info.path, file, csv, (0, 1)))
                    if form := self.likely_form(next(Lines(file, first.offset))):
                        raise ManifestError(f"{info.path} is {form}: {first.error}")
                    if not num_read:
                        unread.append(f"no line of {info.path} is a row: {first.error}")
            files.append(ManifestFile(info.path, num_rows, info.size, info.version, digest=digest))
            offsets.append(np.asarray(marks, dtype=np.int64))
        if unread and len(unread) == sum(file.num_rows > 0 for file in files):
            raise ManifestError(unread[0])
        schema = pa.schema([(name, _column_type(name, found)) for name, found in kinds.items()])
        return Manifest(path, self.name, tuple(files), schema, base, options, tuple(offsets), csv, tuple(unread))

    def read(self, spec: ManifestSpec, units: Sequence[WorkUnit], columns: Sequence[str]) -> Iterator[pa.Table]:
        path = units[0].path
        with _open_text(path, spec.storage_options, units[0]) as file:
            records: Iterator[Record] = iter(())
            row = -1
            for unit in units:
                mark, *place = unit.seek
                if row < 0 or mark > row:  # jump, rather than read what lies between
                    row, records = mark, self.records(path, file, spec.csv, (place[0], place[1]))
                found = []
                for record in itertools.islice(records, unit.stop - row):
                    if row >= unit.start:
                        found.append(record)
                    row += 1
                if row < unit.stop:
                    raise too_few_rows(unit, row)
                yield _table(found, spec.schema, columns, unit)


class _Digested(io.BufferedReader):
    """A file, and a digest of the lines that have been read since it was last set to a place."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._hash = hashlib.sha256()

    def seek(self, offset: int, whence: int = 0) -> int:
        self._hash = hashlib.sha256()
        return super().seek(offset, whence)

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        self._hash.update(line)
        return line

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()[:DIGEST_DIGITS]


@contextmanager
def _open_text(path: str, options: StorageOptions, unit: WorkUnit | None = None) -> Iterator[BinaryIO]:
    """The file's text. Raises ManifestError where it is none, or is not the file that the unit was planned for."""
    with storage.open_input(path, options) as file:
        if unit is not None:
            check_same_file(unit, storage.opened_info(file, path, options))
        text: Any = file
        if path.lower().endswith(".gz") or file.read(2) == b"\x1f\x8b":  # also where the name does not say so
            file.seek(0)
            text = io.BufferedReader(gzip.GzipFile(fileobj=file), buffer_size=1 << 20)
        try:
            text.seek(0)
            start = text.read(_LOOKED_AT_BYTES)
            if found := next((found for first, found in _NOT_TEXT if start.startswith(first)), None):
                raise ManifestError(f"{path} is {found}")
            if b"\x00" in start[:2]:
                raise ManifestError(f"{path} is UTF-16 without its mark, or no text; save it as UTF-8")
            if b"\n" not in start and b"\r" in start.strip():
                raise ManifestError(f"the lines of {path} end in carriage returns alone; write them with line feeds")
            yield text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ManifestError(f"{path} is not a whole gzip file: {first_line(error)}") from error


def _table(records: Sequence[Record], schema: pa.Schema, names: Sequence[str], unit: WorkUnit) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    errors = [record.error for record in records]
    for name in names:
        wanted = schema.field(name).type
        values = [None if record.values is None else record.values.get(name) for record in records]
        if wanted.equals(pa.string()):
            values = [value if value is None or isinstance(value, str) else json_text(value) for value in values]
        try:
            try:
                columns[name] = pa.array(values, type=wanted)
            except UnicodeEncodeError:
                for number, reason in _half_characters(values, wanted):
                    values[number] = None
                    errors[number] = errors[number] or f"line {records[number].line}: the column {name} {reason}"
                columns[name] = pa.array(values, type=wanted)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ManifestError(
                f"column {name} of {unit.path} held {wanted} when the job began and does not now "
                f"({first_line(error)}): was the file changed in the meantime?"
            ) from error
    columns[MANIFEST_ERROR] = pa.array(errors, type=pa.string())
    return pa.table(columns)


def _half_characters(values: Sequence[Any], wanted: pa.DataType) -> Iterator[tuple[int, str]]:
    """(number, reason) of each value that holds a lone surrogate (`\\ud800`), which JSON allows and UTF-8 does not."""
    for number, value in enumerate(values):
        try:
            pa.array([value], type=wanted)
        except UnicodeEncodeError as error:
            yield number, f"holds {error.object[error.start]!r}, half of a character; write the whole character"


def storable_name(name: str) -> str:
    """A column's name as text that can be stored: `?` for half a character."""
    return name if name.isascii() else name.encode("utf-8", "replace").decode("utf-8")


def json_text(value: Any) -> str:
    """A value as JSON that can be stored: half a character stays an escape."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _kind(value: Any) -> str:
    """The name in _TYPES of a value's type."""
    if isinstance(value, list):
        kinds = {_kind(item) for item in value if item is not None}
        kind = " ".join(["list", *(kinds - {"int"} if "long" in kinds else kinds)])
    elif isinstance(value, int) and abs(value) > _LARGEST_EXACT:
        kind = "long" if -(2**63) <= value < 2**63 else "json"
    else:
        kind = type(value).__name__
    return kind if kind in _TYPES else "json"


def _column_type(name: str, kinds: set[str]) -> pa.DataType:
    """One Arrow type for all values of a column; text where no other fits."""
    if name in _JSON_ALWAYS or not kinds <= _TYPES.keys():
        return pa.string()
    if {"long", "float"} <= kinds or {"list long", "list float"} <= kinds:
        return pa.string()
    try:
        found = functools.reduce(unify_types, [_TYPES[kind] for kind in kinds], pa.null())
    except pa.ArrowException:
        return pa.string()
    return {pa.null(): pa.string(), _TYPES["list"]: pa.list_(pa.string())}.get(found, found)
