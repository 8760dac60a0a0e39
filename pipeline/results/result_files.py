"""Fragments and parts as Parquet files: write one, read one, read many, and choose between several results of a row."""

from __future__ import annotations

import base64
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import OutputError, first_line
from pipeline.manifest.row_set import Indices, RowNumbering
from pipeline.manifest.text import json_text
from pipeline.results.run_folder import RunFolder
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, Status

T = TypeVar("T")
Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)

PARTITION_KEY = b"qwen2_vl_batch.partition"
"""In a partitioned part's footer: a table of one row and one column, the value that all rows of the part share.
It is in base64, since Parquet's metadata is text: Polars refuses other bytes."""
MAX_TABLE_BYTES = 256 << 20
"""Most bytes of a fragment's or part's rows in memory, unless one row alone has more. Readers hold several at once, and
Arrow can't select rows of a text column above 2 GiB."""
_ROWS_PER_GROUP = 20_000
_BYTES_PER_GROUP = 64 << 20
_LOCAL_READERS, _REMOTE_READERS = 4, 16


def by_bytes(table: pa.Table) -> Iterator[pa.Table]:
    """The rows in tables of at most MAX_TABLE_BYTES, in order."""
    if table.nbytes <= MAX_TABLE_BYTES or table.num_rows <= 1:
        yield table
    else:
        half = table.num_rows // 2
        yield from by_bytes(table.slice(0, half))
        yield from by_bytes(table.slice(half))


def as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """These columns in these types. Raises pa.ArrowException where one can't hold a value."""
    return pa.table([_as_type(table.column(field.name), field.type) for field in schema], schema=schema)


def _as_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column that has the type is left alone: casts of nested types are not all sound, even to the type itself."""
    if column.type.equals(kind):
        return column
    is_json = pa.types.is_list(column.type) or pa.types.is_floating(column.type)
    if is_json and kind.equals(pa.string()):  # as manifests spell lists and floats in a column of text
        return pa.chunked_array([[None if value is None else json_text(value) for value in column.to_pylist()]], kind)
    return column.cast(kind)


def check_kept(folder: RunFolder, kept: pa.Schema) -> None:
    """Raises OutputError where the folder's results have kept columns whose values these types can't hold."""

    def check(path: str) -> None:
        stored = schema_with_partition(read_footer(folder, path).schema.to_arrow_schema())
        for field in kept:
            old = stored.field(field.name).type if field.name in stored.names else field.type
            if old.equals(field.type):
                continue
            try:
                as_schema(read_table(folder, path, [field.name]), pa.schema([field]))
            except pa.ArrowException as error:
                raise OutputError(
                    f"{folder.path} holds results whose column {field.name} is {old}; with the manifest's new files it "
                    f"is {field.type}, which can't hold all their values ({first_line(error)}): write the new files "
                    f"with {old}, or choose another output.path"
                ) from error

    for _ in read_in_order(folder, check, folder.result_files()):
        pass


def write_table(folder: RunFolder, path: str, table: pa.Table) -> None:
    """Publish a table as one file. Raises OutputError."""
    sink = pa.BufferOutputStream()
    # Small row groups with statistics: a reader who wants some rows or columns skips the rest.
    group = min(_ROWS_PER_GROUP, table.num_rows * _BYTES_PER_GROUP // max(table.nbytes, 1))
    pq.write_table(table, sink, compression="zstd", row_group_size=max(1, group))
    folder.publish(path, sink.getvalue().to_pybytes())


def read_table(
    folder: RunFolder, path: str, columns: Sequence[str] | None = None, *, encoded: Sequence[str] = ()
) -> pa.Table:
    """A file's rows. Columns that it lacks are left out; those in `encoded` are read as dictionaries."""
    with storage.open_input(path, folder.storage_options) as file:
        parquet = pq.ParquetFile(file, read_dictionary=list(encoded))
        present = parquet.schema_arrow.names
        wanted = present if columns is None else [name for name in columns if name in present]
        table = parquet.read(columns=wanted)
    return restore_partition(table, parquet.schema_arrow, columns)


def restore_partition(rows: Rows, stored: pa.Schema, columns: Collection[str] | None = None) -> Rows:
    """Rows of a partitioned part with the column that its folder is named by, if that is among `columns` (None: all).

    `stored` is the file's schema. Rows of other files are returned as they are.
    """
    shared = _shared_column(stored)
    if shared is None or (columns is not None and shared.column_names[0] not in columns):
        return rows
    values = pa.repeat(shared.column(0)[0], rows.num_rows)
    return rows.append_column(shared.schema.field(0), values).replace_schema_metadata(None)


def schema_with_partition(stored: pa.Schema) -> pa.Schema:
    """The schema of a file's rows after `restore_partition`."""
    shared = _shared_column(stored)
    return stored if shared is None else stored.append(shared.schema.field(0)).remove_metadata()


def _shared_column(stored: pa.Schema) -> pa.Table | None:
    """The column of which all rows of a partitioned part have the same value, as a table of one row."""
    metadata = stored.metadata or {}
    stored = metadata.get(PARTITION_KEY)
    return None if stored is None else pa.ipc.open_stream(base64.b64decode(stored)).read_all()


def read_footer(folder: RunFolder, path: str) -> pq.FileMetaData:
    """A file's number of rows, schema and statistics."""
    with storage.open_input(path, folder.storage_options, random_access=True) as file:
        return pq.read_metadata(file)


def read_in_order(folder: RunFolder, read: Callable[[str], T], paths: Iterable[str]) -> Iterator[T]:
    """`read(path)` for each path, in order, a few at a time to hide a bucket's latency."""
    threads = _REMOTE_READERS if storage.is_remote(folder.path) else _LOCAL_READERS
    pool = ThreadPoolExecutor(threads, thread_name_prefix="results")
    pending: deque[Future[T]] = deque()
    try:
        for path in paths:
            pending.append(pool.submit(read, path))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def row_indices(table: pa.Table, numbering: RowNumbering) -> Indices:
    """The index [n] of each result row in the whole manifest."""
    return numbering.indices(table.column(MANIFEST_FILE).to_numpy(), table.column(MANIFEST_ROW).to_numpy())


def is_answered(table: pa.Table) -> npt.NDArray[np.bool_]:
    """Whether each row [n] has an answer."""
    answered: npt.NDArray[np.bool_]
    answered = pc.equal(table.column("status"), Status.OK.value).to_numpy(zero_copy_only=False)
    return answered


def winners(keys: Indices, answered: npt.NDArray[np.bool_], attempts: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Positions of the results that count, one for each key [n], in ascending order of the keys.

    An answer wins over an error, whatever the attempts; then the latest attempt wins.
    """
    order = np.lexsort((attempts, answered, keys))
    is_last = np.append(np.diff(keys[order]) != 0, True)[: len(order)]
    positions: npt.NDArray[np.int64] = order[is_last]
    return positions


def count_values(column: pa.ChunkedArray) -> Counter[str]:
    """How often each value occurs; nulls are left out."""
    return Counter({pair["values"]: pair["counts"] for pair in pc.value_counts(column.drop_null()).to_pylist()})
