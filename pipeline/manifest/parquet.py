"""Manifests in Parquet: rows counted from footers, units read row group by row group."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ManifestError, first_line
from pipeline.manifest.files import (
    DIGEST_DIGITS,
    CsvDialect,
    Manifest,
    ManifestFile,
    ManifestFormat,
    ManifestSpec,
    WorkUnit,
    check_same_file,
    plain_type,
    refuse_repeated_names,
    too_few_rows,
    unify_types,
)
from pipeline.schema import MANIFEST_ERROR
from pipeline.storage import FileInfo, StorageOptions

_NOTES_KEY = b"manifest_notes"
_FOOTER_THREADS_LOCAL = 8
_FOOTER_THREADS_REMOTE = 32
_TAIL_BYTES = 64 << 10
"""Of the end of a file, read at once: most footers are shorter."""
_MAGIC = b"PAR1"
_BUFFER_WHOLE_BYTES = 128 << 20
"""Row groups up to this size are fetched in one go; larger ones are streamed."""
_LARGE_GROUP_BYTES = 16 << 20
"""Row groups above this size are decoded once for all their units: their rows can't be reached but from the start."""
_STREAM_BUFFER = 4 << 20
_BATCH_ROWS = 1024
_BATCH_BYTES = 32 << 20
"""Rows are decoded in pieces of about this size: a row may be a number or an hour of video."""


class ParquetFormat(ManifestFormat):
    name = "parquet"
    suffixes = (".parquet", ".pq")

    def open(
        self, path: str, base: str, infos: Sequence[FileInfo], options: StorageOptions, csv: CsvDialect
    ) -> Manifest:
        threads = min(len(infos), _FOOTER_THREADS_REMOTE if storage.is_remote(path) else _FOOTER_THREADS_LOCAL)
        files = []
        notes: dict[str, None] = {}
        types: dict[str, tuple[pa.DataType, str]] = {}
        last = pa.schema([])
        with ThreadPoolExecutor(threads) as pool:
            footers = pool.map(lambda info: read_footer(info, options), infos)
            for info, (footer, digest) in zip(infos, footers, strict=True):
                large = _large_groups(footer)
                files.append(ManifestFile(info.path, footer.num_rows, info.size, info.version, large, digest))
                schema = footer.schema.to_arrow_schema()
                notes |= dict.fromkeys(notes_of(schema.metadata))
                if not schema.equals(last):  # nearly always all files agree, and there is nothing to merge
                    _merge(types, schema, info.path)
                    last = schema
        schema = pa.schema([(name, type) for name, (type, _) in types.items()])
        return Manifest(path, self.name, tuple(files), schema, base, options, notes=tuple(notes))

    def read(self, spec: ManifestSpec, units: Sequence[WorkUnit], columns: Sequence[str]) -> Iterator[pa.Table]:
        with _open_file(units[0], spec.storage_options) as file:
            if units[-1].stop > file.metadata.num_rows:
                raise too_few_rows(units[-1], file.metadata.num_rows)
            held = set(file.schema_arrow.names)
            present = [name for name in columns if name in held]
            if not present:  # a batch of no columns does not know its length
                yield from (_conform(pa.table({}), spec.schema, columns, unit) for unit in units)
                return
            for _, group in itertools.groupby(_pieces(file, units, present), key=lambda piece: piece[0].start):
                pieces = list(group)
                table = pa.Table.from_batches([batch for _, batch in pieces])
                yield _conform(table, spec.schema, columns, pieces[0][0])


def notes_metadata(notes: Sequence[str]) -> dict[bytes, bytes]:
    """The notes of a manifest that this package writes, as metadata of its schema."""
    return {_NOTES_KEY: json.dumps(notes).encode()}


def notes_of(metadata: Mapping[bytes, bytes] | None) -> tuple[str, ...]:
    """The notes in a schema's metadata."""
    return tuple(json.loads((metadata or {}).get(_NOTES_KEY, b"[]")))


def read_footer(info: FileInfo, options: StorageOptions) -> tuple[pq.FileMetaData, str]:
    """The file's footer and a digest of its end, which is the footer and at least `_TAIL_BYTES`: the footer alone says
    little of the rows' order. Raises ManifestError where it is not a Parquet file, or has types unknown to Arrow."""
    try:
        tail = storage.read_tail(info, _TAIL_BYTES, options)
        needed = int.from_bytes(tail[-8:-4], "little") + 8
        if needed > len(tail) and tail.endswith(_MAGIC):
            tail = storage.read_tail(info, needed, options)
        return pq.read_metadata(pa.BufferReader(tail)), hashlib.sha256(tail).hexdigest()[:DIGEST_DIGITS]
    except pa.ArrowNotImplementedError as error:
        raise ManifestError(
            f"{info.path} has a column that Arrow can't read: {first_line(error)}; write it in another type"
        ) from error
    except pa.ArrowException as error:
        raise ManifestError(
            f"{info.path} ({info.size} bytes) is not a whole Parquet file: {first_line(error)}; write it again"
        ) from error


def _large_groups(footer: pq.FileMetaData) -> tuple[int, ...]:
    """See ManifestFile.large_groups."""
    edges: list[int] = []
    stop = 0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        start, stop = stop, stop + group.num_rows
        if group.total_byte_size > _LARGE_GROUP_BYTES:
            edges += [start, stop]
    return tuple(edges)


def _merge(types: dict[str, tuple[pa.DataType, str]], found: pa.Schema, path: str) -> None:
    """Add a file's columns: type, and the file that has it. A column that is known already gets a type that holds the
    values of both."""
    refuse_repeated_names(found.names, path)
    for column in found:
        new = plain_type(column.type)
        old, before = types.setdefault(column.name, (new, path))
        try:
            if not new.equals(column.type):
                pa.nulls(1, column.type).cast(new)  # Arrow lacks a few casts, and then can't read such a column at all
        except pa.ArrowException as error:
            raise ManifestError(
                f"column {column.name} is {column.type} in {path}, which can't be read: {first_line(error)}; "
                f"write it as {new}"
            ) from error
        try:
            unified = old if old.equals(new) else unify_types(old, new)
        except pa.ArrowException as error:
            raise ManifestError(
                f"column {column.name} is {new} in {path} but {old} in {before}; "
                "write the files with one type, or name the column differently"
            ) from error
        types[column.name] = unified, before if unified.equals(old) else path


def _pieces(
    file: pq.ParquetFile, units: Sequence[WorkUnit], names: list[str]
) -> Iterator[tuple[WorkUnit, pa.RecordBatch]]:
    """The units' rows, in order, each piece with the unit that it belongs to.

    A row group may be far larger than a unit and can only be decoded from its beginning: batches before the first unit
    are decoded and dropped.
    """
    stop = 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        position, stop = stop, stop + group.num_rows
        inside = [unit for unit in units if unit.start < stop and unit.stop > position]
        if not inside:
            continue
        columns = (group.column(index) for index in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] in names)
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(size, 1)))
        for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=names, use_threads=False):
            for unit in inside:
                first, last = max(unit.start - position, 0), min(unit.stop - position, batch.num_rows)
                if first < last:
                    yield unit, batch.slice(first, last - first)
            position += batch.num_rows
            if position >= inside[-1].stop:
                break


@contextmanager
def _open_file(unit: WorkUnit, options: StorageOptions) -> Iterator[pq.ParquetFile]:
    """The unit's file. Raises ManifestError where it is not the file that the unit was planned for."""
    path = unit.path
    source: Any
    if storage.is_remote(path):
        source = storage.open_input(path, options, random_access=True)
    else:
        source = pa.OSFile(storage.local_path(path))
    try:
        check_same_file(unit, storage.opened_info(source, path, options))
        footer = pq.read_metadata(source)
        source.seek(0)
        largest = max((footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)), default=0)
        # Small row groups: all their columns in a few large reads. Large ones: a window over each column.
        whole = largest <= _BUFFER_WHOLE_BYTES
        yield pq.ParquetFile(source, metadata=footer, pre_buffer=whole, buffer_size=0 if whole else _STREAM_BUFFER)
    except pa.ArrowException as error:
        raise ManifestError(f"can't read {path}: {first_line(error)}; is it a whole Parquet file?") from error
    finally:
        source.close()


def _conform(table: pa.Table, schema: pa.Schema, names: Sequence[str], unit: WorkUnit) -> pa.Table:
    """The named columns in the manifest's types; a column that this file lacks is null. If the type of another file
    can't hold some values, the table has `schema.MANIFEST_ERROR` too, with the reasons."""
    columns: list[pa.ChunkedArray] = []
    reasons: dict[int, str] = {}
    for name in names:
        wanted = schema.field(name).type
        if name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(unit.num_rows, wanted)]))
            continue
        column = table.column(name)
        try:
            columns.append(column if column.type.equals(wanted) else column.cast(wanted))
        except pa.ArrowException as error:
            if not _is_part_of(column.type, wanted):
                raise ManifestError(
                    f"column {name} of {unit.path} is {column.type} and does not fit the manifest's {wanted}: "
                    f"{first_line(error)}; was the file changed in the meantime?"
                ) from error
            columns.append(_fitting(column, wanted, f"column {name} of {unit.path} is {column.type} here", reasons))
    conformed = pa.table(columns, schema=pa.schema([schema.field(name) for name in names]))
    if not reasons:
        return conformed
    told = pa.array([reasons.get(number) for number in range(unit.num_rows)], pa.string())
    return conformed.append_column(MANIFEST_ERROR, told)


def _is_part_of(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether the manifest's type was made of this one too."""
    try:
        return bool(unify_types(plain_type(found), wanted).equals(wanted))
    except pa.ArrowException:
        return False


def _fitting(column: pa.ChunkedArray, wanted: pa.DataType, what: str, reasons: dict[int, str]) -> pa.ChunkedArray:
    """The column in another type, with nulls for the values that this can't hold, and why by their number."""
    values = []
    for number in range(len(column)):
        value = column.slice(number, 1)
        try:
            values += value.cast(wanted).chunks
        except pa.ArrowException as error:
            values.append(pa.nulls(1, wanted))
            reasons[number] = f"{what} and {wanted} in other files, which can't hold this row's: {first_line(error)}"
    return pa.chunked_array(values, wanted)
