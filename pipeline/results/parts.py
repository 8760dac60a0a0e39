"""Part files: the end of a run, from fragments to parts in manifest order, and the way back."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.errors import ConfigError, OutputError
from pipeline.manifest.row_set import RowNumbering
from pipeline.results import result_files
from pipeline.results.error_log import ErrorLog
from pipeline.results.fragments import read_range, write_fragment
from pipeline.results.result_files import (
    PARTITION_KEY,
    as_schema,
    by_bytes,
    is_answered,
    read_footer,
    read_in_order,
    read_table,
    row_indices,
    winners,
    write_table,
)
from pipeline.results.run_folder import RunFolder

_MAX_FOLDER_NAME = 255
"""Bytes that file systems allow in one name."""
_MAX_COLUMN_NAME = 160
_DIGEST_CHARS = 16


def check_partition(column: pa.Field) -> None:
    """Raises ConfigError for a column whose values can't name folders."""
    try:
        if _is_bytes(column.type):
            raise pa.ArrowNotImplementedError("bytes are no text")
        _texts(pa.chunked_array([pa.nulls(1, column.type)]))
        if len(quote(column.name, safe="")) > _MAX_COLUMN_NAME:
            raise ConfigError(f"output.partition_by: the name {column.name} is too long for a folder")
    except pa.ArrowNotImplementedError as error:
        raise ConfigError(
            f"output.partition_by: {column.name} is {column.type}, whose values can't name folders; choose a column of "
            "text, numbers, booleans, dates or times"
        ) from error


def finalise(
    folder: RunFolder,
    numbering: RowNumbering,
    schema: pa.Schema,
    *,
    rows_per_part: int,
    partition_by: str | None = None,
    errors: ErrorLog | None = None,
) -> int:
    """Write the parts from the fragments, check their count, mark success. The fragments stay: they are removed once
    run.json says `finished` too.

    The failed rows among them are written to `errors`.

    Memory holds one part and a few of the fragments that overlap it. Returns the number of parts.
    Raises OutputError when a row is missing.
    """
    paths = folder.fragments()
    ranges = read_in_order(folder, lambda path: read_range(folder, path), paths)
    sources = [(path, *span) for path, span in zip(paths, ranges, strict=True)]
    written: set[str] = set()
    for table in _tables_in_order(folder, sources, numbering, schema, rows_per_part):
        if errors is not None:
            errors.add(table)
        for subfolders, piece in _partitions(table, partition_by):
            # Every part has its own number, so that two values may share a folder, as null and Hive's word for it do.
            path = folder.part(*subfolders, f"part-{len(written):05d}.parquet")
            storage.make_dir(storage.parent(path), folder.storage_options)
            write_table(folder, path, piece)
            written.add(path)
    for path in folder.parts():
        if path not in written:
            folder.delete(path)
    counted = _count_rows(folder, folder.parts())
    if counted != numbering.num_rows:
        raise OutputError(f"{folder.path}: the parts hold {counted} rows, the manifest {numbering.num_rows}")
    if errors is not None:
        errors.flush()
    folder.mark_finished()
    return len(written)


def restore_success(folder: RunFolder, record: Mapping[str, Any]) -> bool:
    """Write `_SUCCESS` again where it alone is missing, as after a sync that leaves out empty files; whether it did.
    `record` is run.json. Raises OutputError where parts are missing too.

    Fragments are removed only once the parts are complete and run.json says `finished`, so a run that was stopped
    before has them all. One that was stopped while they were removed, or in `reopen`, has some or all; there run.json
    says `finished`, and the parts hold all rows or the fragments do.
    """
    parts = [] if folder.is_finished() else folder.parts()
    was_finished, has_fragments = record.get("state") == "finished", bool(folder.fragments())
    if not parts or (has_fragments and not was_finished):
        return False
    try:
        counted, expected = _count_rows(folder, parts), record["manifest"].get("num_rows")
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{folder.path} has part files but no _SUCCESS, and can't be read: {error}") from error
    if counted == expected:
        folder.mark_finished()
        return True
    if has_fragments:
        return False
    raise OutputError(
        f"{folder.path} has part files but no _SUCCESS, and they hold {counted} rows, where run.json says {expected}: "
        "put back the part files that are missing, or choose another output.path"
    )


def _count_rows(folder: RunFolder, parts: Sequence[str]) -> int:
    return sum(read_in_order(folder, lambda path: int(read_footer(folder, path).num_rows), parts))


def reopen(folder: RunFolder, numbering: RowNumbering) -> None:
    """Turn a finished folder's parts back into fragments, so that rows can be run again or added.

    The copies come first, and `_SUCCESS` is removed before the parts: at every moment one of them is complete.
    """
    storage.make_dir(folder.file("fragments"), folder.storage_options)
    parts = folder.parts()
    for part in parts:
        name = folder.relative(part).removesuffix(".parquet").replace("/", "-")
        for number, table in enumerate(by_bytes(read_table(folder, part))):
            if table.num_rows:
                write_fragment(folder, f"0-{name}-{number}", table, numbering)
    folder.mark_unfinished()
    for path in parts:
        folder.delete(path)


def _tables_in_order(
    folder: RunFolder,
    sources: Sequence[tuple[str, int, int]],
    numbering: RowNumbering,
    schema: pa.Schema,
    max_rows: int,
) -> Iterator[pa.Table]:
    """All rows in order, one result each, in tables of at most `max_rows` rows and about MAX_TABLE_BYTES."""
    start, num_rows = 0, max_rows
    while start < max(numbering.num_rows, 1):
        stop = min(start + num_rows, numbering.num_rows)
        table = _rows_between(folder, sources, numbering, schema, start, stop)
        if table is None:
            num_rows = (stop - start + 1) // 2
            continue
        if table.num_rows != stop - start:
            raise OutputError(
                f"{folder.path}: rows {start} to {stop - 1} of the manifest have {table.num_rows} results, expected "
                f"{stop - start}: run the same command again"
            )
        yield table
        start = max(stop, 1)
        if table.nbytes * 4 < result_files.MAX_TABLE_BYTES:  # the large rows are over
            num_rows = min(num_rows * 2, max_rows)


def _rows_between(
    folder: RunFolder,
    sources: Sequence[tuple[str, int, int]],
    numbering: RowNumbering,
    schema: pa.Schema,
    start: int,
    stop: int,
) -> pa.Table | None:
    """Rows [start, stop) in order, one result each; None where several have more than MAX_TABLE_BYTES.

    `sources`: path, first and last index of each fragment.
    """

    def read(path: str) -> pa.Table:
        table = read_table(folder, path)
        indices = row_indices(table, numbering)
        return as_schema(table.filter(pa.array((indices >= start) & (indices < stop))), schema)

    overlapping = [path for path, first, last in sources if last >= start and first < stop]
    tables, num_bytes = [pa.Table.from_batches([], schema)], 0
    for table in read_in_order(folder, read, overlapping):
        tables.append(table)
        num_bytes += table.nbytes
        if num_bytes > result_files.MAX_TABLE_BYTES and stop - start > 1:
            return None
    table = pa.concat_tables(tables)
    attempts = table.column("attempts").to_numpy()
    return table.take(pa.array(winners(row_indices(table, numbering), is_answered(table), attempts)))


def _partitions(table: pa.Table, column: str | None) -> Iterator[tuple[list[str], pa.Table]]:
    """(subfolders, rows) for each value of a column, which moves into the folder's name and the part's footer."""
    if column is None:
        yield [], table
        return
    # By their text, since NaN equals nothing, and -0.0 equals 0.0.
    texts = _texts(table.column(column)).combine_chunks().dictionary_encode(null_encoding="encode")
    codes = texts.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    table = table.take(pa.array(order))
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    for start, stop in itertools.pairwise([*starts.tolist(), len(codes)]):
        rows = table.slice(start, stop - start)
        sink = pa.BufferOutputStream()
        shared = rows.select([column]).slice(0, 1).replace_schema_metadata(None)
        with pa.ipc.new_stream(sink, shared.schema) as stream:
            stream.write_table(shared)
        rows = rows.drop_columns([column]).replace_schema_metadata({PARTITION_KEY: base64.b64encode(sink.getvalue())})
        yield [_partition_folder(column, texts.dictionary[int(codes[order[start]])].as_py())], rows


def _is_bytes(kind: pa.DataType) -> bool:
    kind = getattr(kind, "storage_type", kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _texts(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values as text. Raises pa.ArrowNotImplementedError for types that have none."""
    if pa.types.is_timestamp(values.type):  # without its zone, which this machine may not know
        values = values.cast(pa.timestamp(values.type.unit))
    return values.cast(pa.large_string())


def _partition_folder(column: str, text: str | None) -> str:
    """Hive's way of naming, from which readers with hive partitioning restore the column; a long value is cut."""
    name = f"{quote(column, safe='')}="
    value = "__HIVE_DEFAULT_PARTITION__" if text is None else quote(text, safe=" ,()")
    if len(name) + len(value) > _MAX_FOLDER_NAME:
        digest = hashlib.sha256(value.encode()).hexdigest()[:_DIGEST_CHARS]
        value = f"{value[: _MAX_FOLDER_NAME - len(name) - _DIGEST_CHARS - 3]}...{digest}"
    return name + value
