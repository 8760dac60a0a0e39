"""Find and fingerprint the manifest, plan work units, read their rows.

    path --open_manifest--> Manifest --plan_units--> WorkUnit ... --read_unit--> table of exactly those rows

A row's identity is its place: (number of the file, number of the row in it). Knows the file formats and their row
counts; not what the columns mean, nor anything of media, prompts or results.

How a path is understood:
- A file goes by its suffix: Parquet (.parquet, .pq), JSONL (.jsonl, .ndjson), CSV (.csv, .tsv); text files may be
  gzipped (.gz). An image or video alone is a manifest of one row.
- A folder, bucket prefix or glob holds files of one of these kinds, or media. Where data files and media lie together,
  the data files directly in the folder are the manifest, since they most likely name the media; data files deeper down
  beside media are ignored. Two kinds of data files are refused: only the user knows which is meant.
- Files and folders whose names begin with a dot are skipped, and data files that begin with an underscore
  (`_SUCCESS`, `_metadata`).
- A manifest without rows is fine: its job ends with zero rows. A folder without usable files is an error.

Columns per format:
- Parquet keeps its types; files of a folder are unified (missing column: null; wider number wins).
- JSONL keeps bool, int, float, string and flat lists of these, decided over all rows of all files, so that a column
  has one type in every unit. Anything else (objects, nested or mixed values, `messages`) becomes a JSON string, with
  strings left as they are.
- CSV has strings only, exactly as they are written; an empty field is null.
- A line that can't be read (not JSON, too many fields) is still a row: all null, the reason in `_manifest_error`.
"""

from __future__ import annotations

import bisect
import csv
import gzip
import io
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.storage import FileInfo, StorageOptions

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

LISTING_SCHEMA = pa.schema([("id", pa.string()), ("image", pa.string()), ("video", pa.string())])
_LISTING_SOURCE = b"listed_path"
_LISTING_BASE = b"listed_base"
_LISTING_GROUP_ROWS = 10_000

_FOOTER_THREADS_LOCAL = 8
_FOOTER_THREADS_REMOTE = 32
_INDEX_STRIDE = 128
"""Text files: the byte offset of every row whose number is a multiple of this is kept."""
_MAX_CSV_FIELD = 256 << 20
_BUFFER_WHOLE_BYTES = 128 << 20
"""Parquet: row groups up to this size are fetched in one go; larger ones are streamed."""
_STREAM_BUFFER = 4 << 20
_BATCH_ROWS = 1024
_BATCH_BYTES = 32 << 20
"""Parquet is decoded in pieces of about this size: a row may be a number or an hour of video."""
_JSON_ALWAYS = frozenset({"messages"})
_MAX_DIFFERENCES = 20


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
            "files": [[_relative(file.path, self.base), file.size, file.num_rows] for file in self.files],
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


# ---------------------------------------------------------------------------------------------------------------------
# Finding the manifest


def open_manifest(
    path: str,
    *,
    format: str = "auto",
    storage_options: StorageOptions = None,
    listing_path: str,
    listing_options: StorageOptions = None,
) -> Manifest:
    """Find the manifest's files and count their rows. Reads metadata only; text files are read once, to count.

    A folder of media is listed into a Parquet file at `listing_path` (reached with `listing_options`); a listing that
    is there already is used again, so that a resumed job sees the rows of its first run. Raises ManifestError.
    """
    accepted = ("auto", *SUFFIXES, "media")
    if format not in accepted:
        raise ManifestError(f"input.format is {format!r}; allowed: {', '.join(accepted)}")
    # Readers may run in other folders or processes.
    path, listing_path = storage.absolute(path), storage.absolute(listing_path)
    try:
        if format in ("auto", "media") and storage.exists(listing_path, listing_options):
            listed = _open_listing(path, listing_path, listing_options, storage_options)
            if listed is not None:
                return listed
        base, found = _find(path, storage_options)
        kind, chosen = _choose(path, base, found, format)
        if kind == "media":
            _write_listing(path, base, chosen, listing_path, listing_options)
            written = _open_listing(path, listing_path, listing_options, storage_options)
            assert written is not None
            return written
        if kind == "parquet":
            return _open_parquet(path, base, chosen, storage_options)
        return _open_text(path, base, chosen, kind, storage_options)
    except OSError as error:
        raise ManifestError(f"can't read the manifest {path}: {_first_line(error)}") from error


def _find(path: str, options: StorageOptions) -> tuple[str, list[FileInfo]]:
    """The folder that relative paths refer to, and the files that may be meant."""
    if not path:
        raise ManifestError("input.path is empty; expected a Parquet, JSONL or CSV file, or a folder or glob of them")
    if storage.is_dir(path, options):
        base = path if path.endswith("://") or path == "/" else path.rstrip("/")
        return base, storage.list_files(base, options)
    if storage.exists(path, options):  # before the glob: brackets are allowed in file names
        return storage.parent(path), [storage.file_info(path, options)]
    if storage.is_glob(path):
        found = storage.glob(path, options)
        if not found:
            raise ManifestError(f"no file matches {path}; input.path takes a file, a folder or a glob of files")
        return storage.glob_base(path), found
    raise ManifestError(f"no file or folder at {path}; set input.path to a Parquet, JSONL or CSV file, or to a folder")


def _choose(path: str, base: str, found: list[FileInfo], format: str) -> tuple[ManifestFormat, list[FileInfo]]:
    """The manifest's format and its files among those found."""
    single = len(found) == 1 and found[0].path == path
    by_kind: dict[str, list[FileInfo]] = {}
    for info in found:
        by_kind.setdefault("data" if single and format in SUFFIXES else _kind(info.path), []).append(info)
    if format != "auto":
        kind: ManifestFormat = format  # type: ignore[assignment]
        chosen = by_kind.get("data") or by_kind.get(kind, [])  # a single file's format may be forced on it
    else:
        kinds = [name for name in SUFFIXES if name in by_kind]
        if "media" in by_kind and kinds:
            for name in kinds:
                by_kind[name] = [info for info in by_kind[name] if "/" not in _relative(info.path, base)]
            kinds = [name for name in kinds if by_kind[name]]
        if len(kinds) > 1:
            counts = ", ".join(f"{len(by_kind[name])} {name} (such as {by_kind[name][0].path})" for name in kinds)
            raise ManifestError(
                f"{path} holds manifests of several formats: {counts}; set input.path to one file or glob"
            )
        kind = kinds[0] if kinds else "media"  # type: ignore[assignment]
        chosen = by_kind.get(kind, [])
    if not chosen:
        wanted = ", ".join(s for suffixes in SUFFIXES.values() for s in suffixes) + ", or images and videos"
        if format != "auto":
            wanted = ", ".join(SUFFIXES.get(format, IMAGE_SUFFIXES + VIDEO_SUFFIXES))
        elif single:
            wanted += "; a file of another name needs input.format"
        names = ", ".join(storage.name(info.path) for info in found[:5])
        seen = f"{len(found)} files ({names}{', ...' if len(found) > 5 else ''})" if found else "no files"
        raise ManifestError(f"nothing to read at {path}: found {seen}; expected {wanted}")
    return kind, chosen


def _kind(path: str) -> str:
    lowered = storage.name(path).lower()
    for kind, suffixes in SUFFIXES.items():
        if lowered.endswith(suffixes):
            return "other" if lowered.startswith("_") else kind
    return "media" if lowered.endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES) else "other"


def _relative(path: str, base: str) -> str:
    """The path as seen from the base; unchanged where it does not lie below it."""
    prefix = base if base.endswith("/") else base + "/"
    return path.removeprefix(prefix)


# ---------------------------------------------------------------------------------------------------------------------
# Folders of media


def _write_listing(path: str, base: str, media: list[FileInfo], listing_path: str, options: StorageOptions) -> None:
    names = [_relative(info.path, base) for info in media]
    is_image = [name.lower().endswith(IMAGE_SUFFIXES) for name in names]
    columns = {
        "id": names,
        "image": [name if image else None for name, image in zip(names, is_image, strict=True)],
        "video": [None if image else name for name, image in zip(names, is_image, strict=True)],
    }
    metadata = {_LISTING_SOURCE: path.encode(), _LISTING_BASE: base.encode()}
    table = pa.table(columns, schema=LISTING_SCHEMA.with_metadata(metadata))
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=_LISTING_GROUP_ROWS, compression="zstd")
    storage.make_dir(storage.parent(listing_path), options)
    storage.publish(listing_path, sink.getvalue(), options)


def _open_listing(
    path: str, listing_path: str, listing_options: StorageOptions, media_options: StorageOptions
) -> Manifest | None:
    """The listing as a manifest; None where the path is by now a manifest of another kind."""
    info = storage.file_info(listing_path, listing_options)
    footer = _read_footer(info, listing_options)
    metadata = footer.schema.to_arrow_schema().metadata or {}
    source = metadata.get(_LISTING_SOURCE, b"").decode()
    if source.rstrip("/") != path.rstrip("/"):
        if _is_data_file(path):
            return None  # the caller's comparison of fingerprints says what changed
        raise ManifestError(
            f"{listing_path} lists the media of {source}, but input.path is {path}: "
            "take another output.path, or set input.path back"
        )
    file = ManifestFile(listing_path, footer.num_rows, info.size, info.version)
    base = metadata[_LISTING_BASE].decode()
    return Manifest(path, "media", (file,), LISTING_SCHEMA, base, listing_options)


def _is_data_file(path: str) -> bool:
    return _kind(path) in SUFFIXES


# ---------------------------------------------------------------------------------------------------------------------
# Parquet


def _open_parquet(path: str, base: str, found: list[FileInfo], options: StorageOptions) -> Manifest:
    remote = storage.is_remote(path)
    threads = min(len(found), _FOOTER_THREADS_REMOTE if remote else _FOOTER_THREADS_LOCAL)
    schema: pa.Schema | None = None
    last: pa.Schema | None = None
    files = []
    with ThreadPoolExecutor(threads) as pool:
        for info, (num_rows, found_schema) in zip(
            found, pool.map(lambda info: _count_parquet(info, options), found), strict=True
        ):
            files.append(ManifestFile(info.path, num_rows, info.size, info.version))
            # Nearly always all files agree, and then nothing has to be merged.
            if last is None or not found_schema.equals(last):
                schema = _unify(schema, found_schema, info.path)
                last = found_schema
    assert schema is not None
    return Manifest(path, "parquet", tuple(files), schema, base, options)


def _count_parquet(info: FileInfo, options: StorageOptions) -> tuple[int, pa.Schema]:
    footer = _read_footer(info, options)
    return footer.num_rows, footer.schema.to_arrow_schema()


def _read_footer(info: FileInfo, options: StorageOptions) -> pq.FileMetaData:
    try:
        if not storage.is_remote(info.path):
            return pq.read_metadata(storage.local_path(info.path))
        with storage.open_input(info.path, options) as file:
            return pq.read_metadata(file)
    except (pa.ArrowInvalid, pa.ArrowException) as error:
        raise ManifestError(
            f"{info.path} ({info.size} bytes) is not a whole Parquet file: {_first_line(error)}; write it again"
        ) from error


def _unify(known: pa.Schema | None, found: pa.Schema, path: str) -> pa.Schema:
    """The columns of both, with types that hold the values of both."""
    if len(set(found.names)) < len(found.names):
        twice = sorted({name for name in found.names if found.names.count(name) > 1})
        raise ManifestError(f"{path} has several columns of the same name: {', '.join(twice)}; rename them")
    types = {} if known is None else {column.name: column.type for column in known}
    for column in found:
        new = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        old = types.get(column.name)
        if old is None or old.equals(new):
            types[column.name] = new
            continue
        try:
            merged = pa.unify_schemas(
                [pa.schema([(column.name, old)]), pa.schema([(column.name, new)])], promote_options="permissive"
            )
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise ManifestError(
                f"column {column.name} is {new} in {path} but {old} in the files before it; "
                "write the files with one type, or name the column differently"
            ) from error
        types[column.name] = merged.field(0).type
    return pa.schema(list(types.items()))


def _read_parquet(spec: ReadSpec, units: Sequence[WorkUnit], names: Sequence[str]) -> Iterator[pa.Table]:
    with _open_parquet_file(units[0].path, spec.storage_options) as file:
        if units[-1].stop > file.metadata.num_rows:
            raise _changed(units[-1], file.metadata.num_rows)
        present = [name for name in names if name in file.schema_arrow.names]
        if not present:  # a batch of no columns does not know its length
            yield from (_conform(pa.table({}), spec.schema, names, unit) for unit in units)
            return
        left = list(reversed(units))
        pieces: list[pa.RecordBatch] = []
        for position, batch in _batches(file, units, present):
            end = position + batch.num_rows
            while left and left[-1].start < end:
                unit = left[-1]
                first, last = max(unit.start - position, 0), min(unit.stop, end) - position
                pieces.append(batch.slice(first, last - first))
                if unit.stop > end:
                    break
                yield _conform(pa.Table.from_batches(pieces), spec.schema, names, left.pop())
                pieces = []
            if not left:
                return


def _batches(file: pq.ParquetFile, units: Sequence[WorkUnit], names: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The row groups that hold any of the units, piece by piece, each with the number of its first row.

    Groups may be far larger than a unit, and Parquet can't be entered in the middle of one: what comes before the
    first unit is decoded and passed over, never held.
    """
    start = 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        position, start = start, start + group.num_rows
        first = bisect.bisect_right(units, position, key=lambda unit: unit.stop)
        if first == len(units) or units[first].start >= start:
            continue
        wanted = set(names)
        columns = (group.column(i) for i in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] in wanted)
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(size, 1)))
        for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=names, use_threads=False):
            yield position, batch
            position += batch.num_rows


@contextmanager
def _open_parquet_file(path: str, options: StorageOptions) -> Iterator[pq.ParquetFile]:
    source: Any
    if storage.is_remote(path):
        source = storage.open_input(path, options, random_access=True)
    else:
        source = pa.OSFile(storage.local_path(path))
    try:
        footer = pq.read_metadata(source)
        source.seek(0)
        largest = max((footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)), default=0)
        # Small row groups: all their columns in a few large reads. Large ones: a window over each column.
        whole = largest <= _BUFFER_WHOLE_BYTES
        yield pq.ParquetFile(source, metadata=footer, pre_buffer=whole, buffer_size=0 if whole else _STREAM_BUFFER)
    except pa.ArrowException as error:
        raise ManifestError(f"can't read {path}: {_first_line(error)}; is it a whole Parquet file?") from error
    finally:
        source.close()


def _conform(table: pa.Table, schema: pa.Schema, names: Sequence[str], unit: WorkUnit) -> pa.Table:
    """The named columns in the manifest's types; a column that this file lacks is null."""
    columns = []
    for name in names:
        wanted = schema.field(name).type
        if name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(unit.num_rows, wanted)]))
            continue
        column = table.column(name)
        try:
            columns.append(column if column.type.equals(wanted) else column.cast(wanted))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ManifestError(
                f"column {name} of {unit.path} is {column.type} and does not fit the manifest's {wanted}: "
                f"{_first_line(error)}; write the files with one type"
            ) from error
    return pa.table(columns, schema=pa.schema([schema.field(name) for name in names]))


# ---------------------------------------------------------------------------------------------------------------------
# JSONL and CSV

_Record: TypeAlias = tuple[int, dict[str, Any] | None, str | None]
"""Byte at which a row begins; its values, or why it has none."""


def _open_text(path: str, base: str, found: list[FileInfo], kind: ManifestFormat, options: StorageOptions) -> Manifest:
    """Read every file once: rows are counted, offsets noted and column types decided."""
    types: dict[str, set[str]] = {}
    files, offsets = [], []
    for info in found:
        num_rows = 0
        marks = []
        for offset, values, _ in _records(kind, info.path, options):
            if num_rows % _INDEX_STRIDE == 0:
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


def _read_text(spec: ReadSpec, units: Sequence[WorkUnit], names: Sequence[str]) -> Iterator[pa.Table]:
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
            raise _changed(unit, row)
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
                f"({_first_line(error)}): was the file changed meanwhile?"
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
                raise ManifestError(f"{path} is not a whole gzip file: {_first_line(error)}") from error


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
            yield begin, None, f"the line is not UTF-8: {_first_line(error)}"
        except (ValueError, RecursionError) as error:
            yield begin, None, f"the line is not JSON: {_first_line(error)}; found {_excerpt(line)}"
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
            self.broken = f"the line is not UTF-8: {_first_line(error)}"
            return line.decode("utf-8", "replace")


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


# ---------------------------------------------------------------------------------------------------------------------
# Planning and reading


def plan_units(
    manifest: Manifest,
    *,
    rows_per_unit: int,
    limit: int | None = None,
    finished: Mapping[int, npt.NDArray[np.bool_] | npt.NDArray[np.uint8]] | None = None,
) -> Iterator[WorkUnit]:
    """Work units of at most `rows_per_unit` rows, in manifest order, without the finished rows.

    `limit` counts from the manifest's first row, finished or not, so that a resumed job stops at the same row.
    `finished` maps a file's number to one truth value per row: a bool array, or bits packed eight to a byte in Arrow's
    order (`np.packbits(..., bitorder="little")`). Rows beyond the array's end are unfinished.
    """
    assert rows_per_unit >= 1, rows_per_unit
    left = manifest.num_rows if limit is None else min(limit, manifest.num_rows)
    for number, file in enumerate(manifest.files):
        if left <= 0:
            return
        count = min(file.num_rows, left)
        left -= count
        done = (finished or {}).get(number)
        for begin, end in [(0, count)] if done is None else _unfinished(done, count):
            for start in range(begin, end, rows_per_unit):
                stop = min(start + rows_per_unit, end)
                yield WorkUnit(number, file.path, start, stop, _seek(manifest, number, start))


def unit_of(manifest: Manifest, number: int, start: int, stop: int) -> WorkUnit:
    """The unit of rows [start, stop) of file `number`."""
    return WorkUnit(number, manifest.files[number].path, start, stop, _seek(manifest, number, start))


def _unfinished(done: npt.NDArray[Any], count: int) -> list[tuple[int, int]]:
    """Runs [begin, end) of unfinished rows among the first `count`."""
    bits = done if done.dtype == np.bool_ else np.unpackbits(done, bitorder="little").view(np.bool_)
    edges = np.zeros(count + 2, dtype=np.int8)  # a finished row before the first and after the last
    edges[1:-1] = 1
    known = min(count, len(bits))
    edges[1 : known + 1] -= bits[:known].view(np.int8)
    steps = np.diff(edges)
    return list(zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True))


def _seek(manifest: Manifest, number: int, row: int) -> tuple[int, int]:
    if not manifest.offsets:
        return (0, 0)
    mark = row // _INDEX_STRIDE
    return mark * _INDEX_STRIDE, int(manifest.offsets[number][mark])


def read_unit(spec: ReadSpec, unit: WorkUnit, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Exactly the unit's rows, in order: the named columns, or all of the manifest's, in the manifest's types.

    JSONL and CSV rows have `_manifest_error` besides. Raises ManifestError.
    """
    (table,) = read_units(spec, [unit], columns=columns)
    return table


def read_units(
    spec: ReadSpec, units: Sequence[WorkUnit], *, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """A table for each of several units, as by `read_unit`, in one pass over each file.

    The units come in manifest order. Neighbours read together cost one look at their row group, where alone each costs
    one; that tells for large row groups, and for the scattered rows of a retry.
    """
    names = list(spec.schema.names if columns is None else dict.fromkeys(columns))
    missing = [name for name in names if name not in spec.schema.names and name != ERROR_COLUMN]
    if missing:
        raise ManifestError(
            f"the manifest has no column {', '.join(missing)}; its columns: {', '.join(spec.schema.names) or 'none'}"
        )
    names = [name for name in names if name != ERROR_COLUMN]
    read: Callable[[ReadSpec, Sequence[WorkUnit], Sequence[str]], Iterator[pa.Table]]
    read = _read_text if spec.format in ("jsonl", "csv") else _read_parquet
    for _, group in itertools.groupby(units, key=lambda unit: unit.file):
        of_file = list(group)
        assert all(a.stop <= b.start for a, b in itertools.pairwise(of_file)), "units out of order"
        try:
            for unit, table in zip(of_file, read(spec, of_file, names), strict=True):
                assert not table.num_columns or table.num_rows == unit.num_rows, (table.num_rows, unit)
                yield table
        except OSError as error:
            rows = f"{of_file[0].start} to {of_file[-1].stop}"
            raise ManifestError(f"can't read rows {rows} of {of_file[0].path}: {_first_line(error)}") from error


def _changed(unit: WorkUnit, num_rows: int) -> ManifestError:
    return ManifestError(
        f"{unit.path} has {num_rows} rows now but had at least {unit.stop} when the job began: "
        "it was changed meanwhile; run the job again to see the difference"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Comparing with an earlier run


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed from one fingerprint to another, a line each; empty when nothing did.

    Order is no change: `keep_file_numbers` restores it, and it differs once a job has taken up new files.
    """
    lines = []
    if old["format"] != new["format"]:
        lines.append(f"the manifest's format was {old['format']} and is {new['format']}")
    before = {name: (size, rows) for name, size, rows in old["files"]}
    after = {name: (size, rows) for name, size, rows in new["files"]}
    for name, (size, rows) in before.items():
        if name not in after:
            lines.append(f"{name} is gone ({rows:,} rows)")
        elif after[name][1] != rows:
            lines.append(f"{name} had {rows:,} rows and has {after[name][1]:,}")
        elif after[name][0] != size:
            lines.append(f"{name} had {size:,} bytes and has {after[name][0]:,}, with as many rows")
    lines.extend(f"{name} is new ({rows:,} rows)" for name, (_, rows) in after.items() if name not in before)
    if len(lines) > _MAX_DIFFERENCES:
        lines[_MAX_DIFFERENCES:] = [f"and {len(lines) - _MAX_DIFFERENCES} more changes"]
    return lines


def only_appended(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether every old file is still there as it was, so that the new files can be taken up in a resumed job."""
    after = {name: [size, rows] for name, size, rows in new["files"]}
    return old["format"] == new["format"] and all(after.get(name) == [size, rows] for name, size, rows in old["files"])


def keep_file_numbers(manifest: Manifest, old: Mapping[str, Any]) -> Manifest:
    """The manifest with the files of an earlier fingerprint first, in their old order, and the new ones behind.

    File numbers are part of a row's identity, so a new file must not move the old ones.
    """
    numbers = {name: number for number, (name, _, _) in enumerate(old["files"])}
    names = [_relative(file.path, manifest.base) for file in manifest.files]
    order = sorted(range(len(names)), key=lambda i: (numbers.get(names[i], math.inf), i))
    return replace(
        manifest,
        files=tuple(manifest.files[i] for i in order),
        offsets=tuple(manifest.offsets[i] for i in order) if manifest.offsets else (),
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
