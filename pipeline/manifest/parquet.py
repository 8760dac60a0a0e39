"""Manifests in Parquet: rows counted from footers, units read row group by row group."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest.files import Manifest, ManifestFile, ReadSpec, WorkUnit, changed, first_line
from pipeline.storage import FileInfo, StorageOptions

_FOOTER_THREADS_LOCAL = 8
_FOOTER_THREADS_REMOTE = 32
_BUFFER_WHOLE_BYTES = 128 << 20
"""Parquet: row groups up to this size are fetched in one go; larger ones are streamed."""
_STREAM_BUFFER = 4 << 20
_BATCH_ROWS = 1024
_BATCH_BYTES = 32 << 20
"""Parquet is decoded in pieces of about this size: a row may be a number or an hour of video."""


def open_parquet(path: str, base: str, found: list[FileInfo], options: StorageOptions) -> Manifest:
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
    footer = read_footer(info, options)
    return footer.num_rows, footer.schema.to_arrow_schema()


def read_footer(info: FileInfo, options: StorageOptions) -> pq.FileMetaData:
    try:
        if not storage.is_remote(info.path):
            return pq.read_metadata(storage.local_path(info.path))
        with storage.open_input(info.path, options) as file:
            return pq.read_metadata(file)
    except (pa.ArrowInvalid, pa.ArrowException) as error:
        raise ManifestError(
            f"{info.path} ({info.size} bytes) is not a whole Parquet file: {first_line(error)}; write it again"
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


def read_parquet(spec: ReadSpec, units: Sequence[WorkUnit], names: Sequence[str]) -> Iterator[pa.Table]:
    with _open_parquet_file(units[0].path, spec.storage_options) as file:
        if units[-1].stop > file.metadata.num_rows:
            raise changed(units[-1], file.metadata.num_rows)
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
        raise ManifestError(f"can't read {path}: {first_line(error)}; is it a whole Parquet file?") from error
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
                f"{first_line(error)}; write the files with one type"
            ) from error
    return pa.table(columns, schema=pa.schema([schema.field(name) for name in names]))
