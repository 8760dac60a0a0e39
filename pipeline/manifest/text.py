"""Manifests in JSONL and CSV: every file is read once to count rows, note offsets and decide the columns' types."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest.files import (
    ERROR_COLUMN,
    INDEX_STRIDE,
    Manifest,
    ManifestFile,
    ManifestFormat,
    ReadSpec,
    WorkUnit,
    changed,
    first_line,
)
from pipeline.storage import FileInfo, StorageOptions

_MAX_CSV_FIELD = 256 << 20
_JSON_ALWAYS = frozenset({"messages"})

_Record: TypeAlias = tuple[int, dict[str, Any] | None, str | None]
"""Byte at which a row begins; its values, or why it has none."""


def open_text(path: str, base: str, found: list[FileInfo], kind: ManifestFormat, options: StorageOptions) -> Manifest:
    """Read every file once: rows are counted, offsets noted and column types decided."""
    types: dict[str, set[str]] = {}
    files, offsets = [], []
    for info in found:
        num_rows = 0
        marks = []
        for offset, values, _ in _records(kind, info.path, options):
            if num_rows % INDEX_STRIDE == 0:
                marks.append(offset)
            num_rows += 1
            if kind == "jsonl" and values is not None:
                for name, value in values.items():
                    seen = types.setdefault(name, set())
                    if value is not None:
                        seen.add(_json_kind(value))
        if kind == "csv":
            for name in _csv_header(info.path, options).names:
                types.setdefault(name, {"string"})
        files.append(ManifestFile(info.path, num_rows, info.size, info.version))
        offsets.append(np.asarray(marks, dtype=np.int64))
    types.pop(ERROR_COLUMN, None)
    schema = pa.schema([(name, _column_type(name, kinds)) for name, kinds in types.items()])
    return Manifest(path, kind, tuple(files), schema, base, options, tuple(offsets))


def read_text(spec: ReadSpec, units: Sequence[WorkUnit], names: Sequence[str]) -> Iterator[pa.Table]:
    records: Iterator[_Record] = iter(())
    row = -1
    for unit in units:
        mark, offset = unit.seek
        if row < 0 or mark > row:  # jump, rather than read what lies between
            row, records = mark, _records(spec.format, unit.path, spec.storage_options, start=offset)
        kept = []
        for record in itertools.islice(records, unit.stop - row):
            if row >= unit.start:
                kept.append(record)
            row += 1
        if row < unit.stop:
            raise changed(unit, row)
        yield _text_table(kept, spec.schema, names, unit)


def _text_table(records: Sequence[_Record], schema: pa.Schema, names: Sequence[str], unit: WorkUnit) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    for name in names:
        wanted = schema.field(name).type
        found = [None if values is None else values.get(name) for _, values, _ in records]
        if pa.types.is_string(wanted):
            found = [None if value is None else _as_text(value) for value in found]
        try:
            columns[name] = pa.array(found, type=wanted)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ManifestError(
                f"column {name} of {unit.path} held {wanted} when the job began and does not now "
                f"({first_line(error)}): was the file changed meanwhile?"
            ) from error
    columns[ERROR_COLUMN] = pa.array([error for _, _, error in records], type=pa.string())
    return pa.table(columns)


def _records(kind: str, path: str, options: StorageOptions, *, start: int = 0) -> Iterator[_Record]:
    """The rows of a text file from the byte `start` on, which must be the beginning of a row."""
    if kind == "csv":
        header = _csv_header(path, options)
        with _open_lines(path, options) as file:
            yield from _csv_records(file, header, max(start, header.end))
    else:
        with _open_lines(path, options) as file:
            yield from _json_records(file, start)


@contextmanager
def _open_lines(path: str, options: StorageOptions) -> Iterator[BinaryIO]:
    with storage.open_input(path, options) as file:
        if not path.lower().endswith(".gz"):
            _refuse_utf16(file, path)
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unzipped:
            buffered = io.BufferedReader(unzipped, buffer_size=1 << 20)
            try:
                _refuse_utf16(buffered, path)
                yield buffered
            except (EOFError, gzip.BadGzipFile) as error:
                raise ManifestError(f"{path} is not a whole gzip file: {first_line(error)}") from error


def _refuse_utf16(file: Any, path: str) -> None:
    start = file.read(4)
    file.seek(0)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ManifestError(f"{path} is UTF-16; save it as UTF-8")
    if start == b"PAR1":
        raise ManifestError(f"{path} is a Parquet file by its first bytes; name it .parquet or set input.format")


def _json_records(file: BinaryIO, start: int) -> Iterator[_Record]:
    file.seek(start)
    offset = start
    for line in file:
        begin, offset = offset, offset + len(line)
        if begin == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except UnicodeDecodeError as error:
            yield begin, None, f"the line is not UTF-8: {first_line(error)}"
        except (ValueError, RecursionError) as error:
            yield begin, None, f"the line is not JSON: {first_line(error)}; found {_excerpt(line)}"
        else:
            if isinstance(values, dict):
                yield begin, values, None
            else:
                found = type(values).__name__
                yield begin, None, f"the line is a JSON {found}; expected an object: found {_excerpt(line)}"


def _excerpt(line: bytes) -> str:
    text = line.strip().decode("utf-8", "replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _json_kind(value: Any) -> str:
    """How a value's type is called when a column's type is decided."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, float):
        return "float"
    if isinstance(value, str):
        return "string"
    if isinstance(value, list):
        inner = {_json_kind(item) for item in value if item is not None}
        if not inner:
            return "list"
        if len(inner) == 1 and (only := inner.pop()) in _SCALAR_TYPES:
            return f"list {only}"
    return "json"


_SCALAR_TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "string": pa.string()}


def _column_type(name: str, kinds: set[str]) -> pa.DataType:
    """One Arrow type for all values of a JSONL column; a string of JSON where none fits."""
    if name in _JSON_ALWAYS:
        return pa.string()
    kinds = set(kinds)
    if kinds == {"int", "float"}:
        return pa.float64()
    if "list" in kinds and len(kinds) > 1:  # an empty list fits any list
        kinds.discard("list")
        if not next(iter(kinds)).startswith("list "):
            return pa.string()
    if kinds == {"list int", "list float"}:
        return pa.list_(pa.float64())
    if len(kinds) != 1:
        return pa.string()
    kind = kinds.pop()
    if kind == "list":
        return pa.list_(pa.string())
    if kind.startswith("list "):
        return pa.list_(_SCALAR_TYPES[kind.removeprefix("list ")])
    return _SCALAR_TYPES.get(kind, pa.string())


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        # A lone surrogate (`\ud800`) is legal JSON and no legal text.
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class _CsvHeader:
    names: tuple[str, ...]
    delimiter: str
    end: int
    """Byte at which the first row begins."""


def _csv_header(path: str, options: StorageOptions) -> _CsvHeader:
    with _open_lines(path, options) as file:
        lines = _CountingLines(file, 0)
        first = next(lines, None)
        if first is None:
            return _CsvHeader((), ",", 0)
        delimiter = "\t" if ".tsv" in storage.name(path).lower() else max(",;\t|", key=first.count)
        try:
            fields = next(csv.reader(_chain(first, lines), delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise ManifestError(f"the first line of {path} is not a CSV header: {error}") from error
        names = tuple(field.strip() or f"column_{number}" for number, field in enumerate(fields))
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ManifestError(f"{path} has several columns of the same name: {', '.join(twice)}; rename them")
        return _CsvHeader(names, delimiter, lines.offset)


def _csv_records(file: BinaryIO, header: _CsvHeader, start: int) -> Iterator[_Record]:
    csv.field_size_limit(min(_MAX_CSV_FIELD, sys.maxsize))  # a data: URL is one long field
    lines = _CountingLines(file, start)
    reader = csv.reader(lines, delimiter=header.delimiter, strict=True)
    while True:
        begin = lines.offset
        lines.broken = None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield begin, None, f"the line is not CSV: {error}"
            continue
        if not fields:  # an empty line
            continue
        if lines.broken:
            yield begin, None, lines.broken
        elif len(fields) != len(header.names):
            yield (
                begin,
                None,
                f"the row has {len(fields)} fields but the header names {len(header.names)}; "
                "fields with commas or line breaks need quotes",
            )
        else:
            yield begin, {name: text or None for name, text in zip(header.names, fields, strict=True)}, None


class _CountingLines:
    """Lines of a binary file as text, counting the bytes handed out: where a record ends, the next one begins."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        file.seek(start)
        self._file = file
        self.offset = start
        self.broken: str | None = None

    def __iter__(self) -> _CountingLines:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        first, self.offset = self.offset == 0, self.offset + len(line)
        try:
            return line.decode("utf-8-sig" if first else "utf-8")
        except UnicodeDecodeError as error:
            self.broken = f"the line is not UTF-8: {first_line(error)}"
            return line.decode("utf-8", "replace")


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest
