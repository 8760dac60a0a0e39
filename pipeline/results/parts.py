"""Part files: the end of a run, from fragments to parts in manifest order, and the way back."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.manifest.row_set import RowNumbering
from pipeline.results.fragments import read_range, write_fragment
from pipeline.results.result_files import (
    PARTITION_KEY,
    is_answered,
    read_footer,
    read_in_order,
    read_table,
    row_indices,
    winners,
    write_table,
)
from pipeline.results.run_folder import RunFolder


def finalise(
    folder: RunFolder,
    numbering: RowNumbering,
    schema: pa.Schema,
    *,
    rows_per_part: int,
    partition_by: str | None = None,
) -> int:
    """Write the parts from the fragments, check their count, mark success, remove the fragments.

    Memory holds one part and a few of the fragments that overlap it. Returns the number of parts.
    Raises OutputError when a row is missing.
    """
    paths = folder.fragments()
    ranges = read_in_order(folder, lambda path: read_range(folder, path), paths)
    sources = [(path, *span) for path, span in zip(paths, ranges, strict=True)]
    written: set[str] = set()
    for number, start in enumerate(range(0, max(numbering.num_rows, 1), rows_per_part)):
        stop = min(start + rows_per_part, numbering.num_rows)
        table = _rows_between(folder, sources, numbering, schema, start, stop)
        if table.num_rows != stop - start:
            raise OutputError(
                f"{folder.path}: rows {start} to {stop - 1} of the manifest have {table.num_rows} results, expected "
                f"{stop - start}: run the same command again"
            )
        for subfolders, piece in _partitions(table, partition_by):
            path = folder.part(*subfolders, f"part-{number:05d}.parquet")
            storage.make_dir(storage.parent(path), folder.storage_options)
            write_table(folder, path, piece)
            written.add(path)
    for path in folder.parts():
        if path not in written:
            folder.delete(path)
    counted = sum(read_in_order(folder, lambda path: int(read_footer(folder, path).num_rows), folder.parts()))
    if counted != numbering.num_rows:
        raise OutputError(f"{folder.path}: the parts hold {counted} rows, the manifest {numbering.num_rows}")
    folder.mark_finished()
    folder.delete_fragments()
    return len(written)


def reopen(folder: RunFolder, numbering: RowNumbering) -> None:
    """Turn a finished folder's parts back into fragments, so that rows can be run again or added.

    The copies come first, and `_SUCCESS` is removed before the parts: at every moment one of them is complete.
    """
    storage.make_dir(folder.file("fragments"), folder.storage_options)
    parts = folder.parts()
    for part in parts:
        table = read_table(folder, part)
        if table.num_rows:
            name = folder.relative(part).removesuffix(".parquet").replace("/", "-")
            write_fragment(folder, f"0-{name}", table, numbering)
    folder.mark_unfinished()
    for path in parts:
        folder.delete(path)


def _rows_between(
    folder: RunFolder,
    sources: Sequence[tuple[str, int, int]],
    numbering: RowNumbering,
    schema: pa.Schema,
    start: int,
    stop: int,
) -> pa.Table:
    """Rows [start, stop) in order, one result each. `sources`: path, first and last index of each fragment."""

    def read(path: str) -> pa.Table:
        table = read_table(folder, path)
        indices = row_indices(table, numbering)
        return table.filter(pa.array((indices >= start) & (indices < stop))).select(schema.names).cast(schema)

    overlapping = [path for path, first, last in sources if last >= start and first < stop]
    table = pa.concat_tables([schema.empty_table(), *read_in_order(folder, read, overlapping)])
    attempts = table.column("attempts").to_numpy()
    return table.take(pa.array(winners(row_indices(table, numbering), is_answered(table), attempts)))


def _partitions(table: pa.Table, column: str | None) -> Iterator[tuple[list[str], pa.Table]]:
    """(subfolders, rows) for each value of a column, which moves into the folder's name and the part's footer."""
    if column is None:
        yield [], table
        return
    values = table.column(column)
    for value in pc.unique(values):
        rows = table.filter(pc.equal(values, value) if value.is_valid else pc.is_null(values))
        sink = pa.BufferOutputStream()
        shared = rows.select([column]).slice(0, 1).replace_schema_metadata(None)
        with pa.ipc.new_stream(sink, shared.schema) as stream:
            stream.write_table(shared)
        rows = rows.drop_columns([column]).replace_schema_metadata({PARTITION_KEY: base64.b64encode(sink.getvalue())})
        yield [_partition_folder(column, value)], rows


def _partition_folder(column: str, value: pa.Scalar) -> str:
    """Hive's way of naming, from which readers with hive partitioning restore the column."""
    text = quote(str(value.as_py()), safe=" ,()") if value.is_valid else "__HIVE_DEFAULT_PARTITION__"
    return f"{quote(column, safe='')}={text}"
