"""The run folder: fragments while rows finish, part files in manifest order at the end, every row exactly once.

    out/run/  run.json             settings, manifest fingerprint, versions, counts
              manifest.parquet     the listing, where the input was a folder of media
              fragments/*.parquet  finished rows, published whole as they come; gone once the parts stand
              progress.jsonl       counts over time
              part-00000.parquet   final: manifest order, every manifest row once
              _SUCCESS             the parts are complete, their rows counted

    With `partition_by`, parts lie one folder deeper, as in task=count/part-00000.parquet, without that column.

A row that stands in several fragments (a crash between publishing and bookkeeping, or a retry) counts once: the
latest attempt wins, and an answer wins over an error. Order of the last steps: parts, count, `_SUCCESS`, and only
then do the fragments go; so a crash anywhere leaves either fragments that hold every row, or `_SUCCESS`.
Knows result rows and files; not how a row was answered.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.manifest.row_set import Indices, RowNumbering, RowSet
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, PLACE_SCHEMA, Status

T = TypeVar("T")

_COMPRESSION = "zstd"
_ROWS_PER_GROUP = 20_000
_EARLY_FILES = ("manifest.parquet", "log.txt")
"""What a run that was refused before it began may have left."""
_RANGE_KEY = b"qwen2_vl_batch.range"
_PARTITION_KEY = b"qwen2_vl_batch.partition"
"""In a partitioned part's footer: a table of one row and one column, the value that all its rows share."""
_LOCAL_READERS, _REMOTE_READERS = 4, 16
_PART = re.compile(r"([^/]+=[^/]*/)?part-\d+\.parquet")
_STATE_COLUMNS = [MANIFEST_FILE, MANIFEST_ROW, "status", "error_type", "attempts"]


class RunFolder:
    """Names and small files of one run's folder, on disk or in a bucket."""

    def __init__(self, path: str, storage_options: storage.StorageOptions = None) -> None:
        self.path = path.rstrip("/") or path
        self.storage_options = storage_options
        self.guard: Callable[[], None] = lambda: None
        """Called before every change to the folder; raises where it is no longer this run's to change."""

    def file(self, *names: str) -> str:
        """The path of a file in the folder."""
        return storage.join(self.path, *names)

    def prepare(self) -> None:
        """Make the folder. Raises OutputError when it can't be written or holds something else."""
        try:
            if storage.exists(self.path, self.storage_options) and self.read_run() is None:
                strangers = [
                    name for info in self._top_level() if (name := storage.name(info.path)) not in _EARLY_FILES
                ]
                if strangers:
                    raise OutputError(
                        f"{self.path} holds files but no run.json ({', '.join(strangers[:3])}): "
                        "choose an empty or new folder as output.path"
                    )
            storage.make_dir(self.file("fragments"), self.storage_options)
        except OSError as error:
            raise OutputError(f"can't write to output.path {self.path}: {error}") from error

    def _top_level(self) -> list[storage.FileInfo]:
        return storage.list_files(self.path, self.storage_options, recursive=False)

    def read_run(self) -> dict[str, Any] | None:
        """The content of run.json, or None where there is none."""
        try:
            values = json.loads(storage.read_bytes(self.file("run.json"), self.storage_options))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise OutputError(f"{self.file('run.json')} is not JSON: {error}") from error
        assert isinstance(values, dict)
        return values

    def write_run(self, values: dict[str, Any]) -> None:
        """Publish run.json. Raises OutputError when the folder can't be written."""
        text = json.dumps(values, indent=2, default=str)
        _publish(self, self.file("run.json"), text.encode())

    def is_finished(self) -> bool:
        """Whether the parts are complete."""
        return storage.exists(self.file("_SUCCESS"), self.storage_options)

    def fragments(self) -> list[str]:
        """Paths of all fragments, oldest first."""
        found = storage.list_files(self.file("fragments"), self.storage_options)
        return [info.path for info in found if info.path.endswith(".parquet")]

    def parts(self) -> list[str]:
        """Paths of all part files, in manifest order."""
        found = [info.path for info in storage.list_files(self.path, self.storage_options)]
        below = len(self.path.rstrip("/")) + 1
        parts = [path for path in found if _PART.fullmatch(path[below:])]
        return sorted(parts, key=lambda path: (storage.name(path), path))

    def reopen(self) -> None:
        """Turn a finished folder's parts back into fragments, so that rows can be run again or added.

        The copies come first and `_SUCCESS` goes before the parts do: at no moment is a row only half there.
        """
        storage.make_dir(self.file("fragments"), self.storage_options)
        for part in self.parts():
            name = part[len(self.path.rstrip("/")) + 1 :].replace("/", "-")
            _publish_table(self, self.file("fragments", f"0-{name}"), self.read(part))
        self._delete(self.file("_SUCCESS"))
        for part in self.parts():
            self._delete(part)

    def sweep(self) -> None:
        """Remove what runs that were killed in the middle of writing left behind."""
        self.guard()
        storage.sweep(self.path)

    def discard_fragments(self) -> None:
        """Remove the fragments' folder; the parts hold their rows."""
        self._delete(self.file("fragments"), recursive=True)

    def delete_part(self, path: str) -> None:
        """Remove a part file that a finished folder is not to have."""
        self._delete(path)

    def _delete(self, path: str, *, recursive: bool = False) -> None:
        self.guard()
        storage.delete(path, self.storage_options, recursive=recursive)

    def read(self, path: str, columns: Sequence[str] | None = None, *, encoded: Sequence[str] = ()) -> pa.Table:
        """A fragment's or part's rows; the columns in `encoded` as dictionaries."""
        with storage.open_input(path, self.storage_options) as file:
            parquet = pq.ParquetFile(file, read_dictionary=list(encoded))
            present = parquet.schema_arrow.names
            wanted = present if columns is None else [name for name in columns if name in present]
            table = parquet.read(columns=wanted)
            metadata = parquet.schema_arrow.metadata or {}
        if _PARTITION_KEY not in metadata:
            return table
        value = pa.ipc.open_stream(metadata[_PARTITION_KEY]).read_all()
        name = value.column_names[0]
        if columns is not None and name not in columns:
            return table
        table = table.append_column(value.schema.field(0), pa.repeat(value.column(0)[0], table.num_rows))
        return table.replace_schema_metadata(None)

    def metadata(self, path: str) -> pq.FileMetaData:
        """A fragment's or part's footer."""
        with storage.open_input(path, self.storage_options, random_access=True) as file:
            return pq.read_metadata(file)

    def in_order(self, read: Callable[[str], T], paths: Iterable[str]) -> Iterator[T]:
        """What `read` makes of each path, in their order, a few at a time: a bucket takes its time over every file."""
        threads = _REMOTE_READERS if storage.is_remote(self.path) else _LOCAL_READERS
        pool = ThreadPoolExecutor(threads, thread_name_prefix="fragments")
        under_way: deque[Future[T]] = deque()
        try:
            for path in paths:
                under_way.append(pool.submit(read, path))
                if len(under_way) > threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass
class FinishedRows:
    """Which rows the folder already answers, and which of them are errors."""

    done: RowSet
    failed: Indices
    """Indices of error rows, ascending; the latest attempt of each."""
    failed_types: npt.NDArray[np.uint16]
    """Their error types, as numbers in `type_names`."""
    failed_attempts: npt.NDArray[np.int32]
    type_names: list[str]

    @property
    def num_ok(self) -> int:
        """Rows with an answer."""
        return len(self.done) - len(self.failed)

    def take_failed(self, error_types: Sequence[str] | None) -> tuple[Indices, npt.NDArray[np.int32]]:
        """Indices and attempts so far of the error rows of these types (None: all); they are no longer done."""
        wanted = np.ones(len(self.failed), dtype=bool)
        if error_types is not None:
            numbers = [number for number, name in enumerate(self.type_names) if name in error_types]
            wanted = np.isin(self.failed_types, np.array(numbers, np.uint16))
        taken, attempts = self.failed[wanted], self.failed_attempts[wanted]
        self.done.discard(taken)
        self.failed, self.failed_types = self.failed[~wanted], self.failed_types[~wanted]
        self.failed_attempts = self.failed_attempts[~wanted]
        return taken, attempts

    def count_failed(self) -> Counter[str]:
        """How many rows failed, by error type."""
        counts = np.bincount(self.failed_types, minlength=len(self.type_names))
        return Counter({name: int(count) for name, count in zip(self.type_names, counts, strict=True) if count})


def read_finished(folder: RunFolder, numbering: RowNumbering) -> FinishedRows:
    """The rows that the folder's fragments (or its parts, once finished) hold; one bit each, and the failed ones."""
    done, answered = RowSet(numbering.num_rows), RowSet(numbering.num_rows)
    numbers: dict[str, int] = {}
    failed: list[_Failed] = []
    paths = folder.parts() if folder.is_finished() else folder.fragments()
    for indices, ok, found in folder.in_order(lambda path: _read_state(folder, path, numbering), paths):
        done.add(indices)
        answered.add(indices[ok])
        if found is not None:
            own = np.array([numbers.setdefault(name, len(numbers)) for name in found.names], np.uint16)
            failed.append(_Failed(found.indices, own[found.types], found.attempts, []))
    if not failed:
        return FinishedRows(done, np.empty(0, np.int64), np.empty(0, np.uint16), np.empty(0, np.int32), [])
    every = np.concatenate([one.indices for one in failed])
    types, attempts = np.concatenate([one.types for one in failed]), np.concatenate([one.attempts for one in failed])
    latest = _latest(every, attempts)
    latest = latest[~answered.has(every[latest])]
    return FinishedRows(done, every[latest], types[latest], attempts[latest], list(numbers))


@dataclass(frozen=True)
class _Failed:
    """Error rows of one file. At up to 14 bytes a row, many millions of them fit into memory."""

    indices: Indices
    types: npt.NDArray[np.uint16]
    """Numbers in `names`."""
    attempts: npt.NDArray[np.int32]
    names: list[str]


def _read_state(
    folder: RunFolder, path: str, numbering: RowNumbering
) -> tuple[Indices, npt.NDArray[np.bool_], _Failed | None]:
    """(index of each row, whether it has an answer, those that have none)."""
    table = folder.read(path, _STATE_COLUMNS, encoded=("status", "error_type"))
    indices = _indices(table, numbering)
    ok = pc.equal(table.column("status"), Status.OK.value).to_numpy(zero_copy_only=False)
    if ok.all():
        return indices, ok, None
    types = table.column("error_type").filter(pa.array(~ok)).unify_dictionaries()
    names = types.chunk(0).dictionary.to_pylist()
    codes = np.concatenate([chunk.indices.fill_null(len(names)).to_numpy() for chunk in types.chunks])
    attempts = table.column("attempts").to_numpy()[~ok].astype(np.int32, copy=False)
    return indices, ok, _Failed(indices[~ok], codes.astype(np.uint16), attempts, [*names, ""])


def _latest(indices: Indices, rank: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Positions of the highest-ranked record of each index, in order of index."""
    order = np.lexsort((rank, indices))
    last = np.append(np.diff(indices[order]) != 0, True)
    positions: npt.NDArray[np.int64] = order[last]
    return positions


def _indices(table: pa.Table, numbering: RowNumbering) -> Indices:
    return numbering.indices(table.column(MANIFEST_FILE).to_numpy(), table.column(MANIFEST_ROW).to_numpy())


def take_new(table: pa.Table, numbering: RowNumbering, done: RowSet) -> pa.Table:
    """The rows that are not in `done`, each once; they are from now on. After a node is lost a row may come twice."""
    indices = _indices(table, numbering)
    first = np.zeros(len(indices), dtype=bool)
    first[np.unique(indices, return_index=True)[1]] = True
    new = first & ~done.has(indices)
    done.add(indices)
    return table if new.all() else table.filter(pa.array(new))


@dataclass
class FragmentWriter:
    """Collects finished rows and publishes them as fragments, by number of rows and by age."""

    folder: RunFolder
    numbering: RowNumbering
    schema: pa.Schema
    rows_per_fragment: int
    seconds_per_fragment: float
    _waiting: list[pa.Table] = field(default_factory=list)
    _num_waiting: int = 0
    _oldest: float = 0.0
    _run: str = field(default_factory=lambda: f"{time.time_ns() // 1_000_000}-{secrets.token_hex(3)}")
    _next: int = 0

    def add(self, table: pa.Table) -> None:
        """Take finished rows; publish when there are enough of them."""
        if not table.num_rows:
            return
        if not self._waiting:
            self._oldest = time.monotonic()
        self._waiting.append(table.select(self.schema.names).cast(self.schema))
        self._num_waiting += table.num_rows
        if self._num_waiting >= self.rows_per_fragment:
            self.flush()

    def flush_if_old(self) -> None:
        """Publish when the oldest row has waited long enough."""
        if self._waiting and time.monotonic() - self._oldest >= self.seconds_per_fragment:
            self.flush()

    def flush(self) -> None:
        """Publish what waits. Raises OutputError when the folder can't be written."""
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        indices = _indices(table, self.numbering)
        order = np.argsort(indices, kind="stable")
        span = json.dumps([int(indices[order[0]]), int(indices[order[-1]])]).encode()
        table = table.take(pa.array(order)).replace_schema_metadata({_RANGE_KEY: span})
        path = self.folder.file("fragments", f"{self._run}-{self._next:06d}.parquet")
        _publish_table(self.folder, path, table)
        self._next += 1
        self._waiting, self._num_waiting = [], 0


def _publish_table(folder: RunFolder, path: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    # Pages of small row groups with statistics: a reader who wants some rows or columns skips the rest.
    pq.write_table(table, sink, compression=_COMPRESSION, row_group_size=_ROWS_PER_GROUP)
    _publish(folder, path, sink.getvalue().to_pybytes())


def _publish(folder: RunFolder, path: str, data: bytes) -> None:
    folder.guard()
    try:
        storage.publish(path, data, folder.storage_options)
    except OSError as error:
        raise OutputError(f"can't write {path}: {error}; free or mend the storage and run the same command") from error


def finalise(
    folder: RunFolder,
    numbering: RowNumbering,
    schema: pa.Schema,
    *,
    rows_per_part: int,
    partition_by: str | None = None,
) -> int:
    """Write the part files from the fragments, check their count, mark success, remove the fragments.

    Memory holds one part and a few of the fragments that overlap it. Returns the number of parts.
    Raises OutputError when a row is missing.
    """
    paths = folder.fragments()
    ranges = folder.in_order(lambda path: _range(folder, path, numbering), paths)
    sources = [(path, *span) for path, span in zip(paths, ranges, strict=True)]
    written: set[str] = set()
    for number, start in enumerate(range(0, max(numbering.num_rows, 1), rows_per_part)):
        stop = min(start + rows_per_part, numbering.num_rows)
        table = _part(folder, sources, numbering, schema, start, stop)
        if table.num_rows != stop - start:
            raise OutputError(
                f"{folder.path}: rows {start} to {stop - 1} of the manifest have {table.num_rows} results, expected "
                f"{stop - start}: run the same command again"
            )
        for place, piece in _partitions(table, partition_by):
            path = folder.file(*place, f"part-{number:05d}.parquet")
            storage.make_dir(storage.parent(path), folder.storage_options)
            _publish_table(folder, path, piece)
            written.add(path)
    for path in folder.parts():
        if path not in written:
            folder.delete_part(path)
    counted = sum(folder.in_order(lambda path: int(folder.metadata(path).num_rows), folder.parts()))
    if counted != numbering.num_rows:
        raise OutputError(f"{folder.path}: the parts hold {counted} rows, the manifest {numbering.num_rows}")
    _publish(folder, folder.file("_SUCCESS"), b"")
    folder.discard_fragments()
    return len(written)


def _partitions(table: pa.Table, column: str | None) -> Iterator[tuple[list[str], pa.Table]]:
    """A part's rows by the value of a column, which goes into the folder's name and the footer."""
    if column is None:
        yield [], table
        return
    values = table.column(column)
    for value in pc.unique(values):
        rows = pc.is_null(values) if not value.is_valid else pc.fill_null(pc.equal(values, value), False)
        field = pa.field(column, values.type)
        one = pa.table([pa.array([value.as_py()], values.type)], schema=pa.schema([field]))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, one.schema) as stream:
            stream.write_table(one)
        piece = table.filter(rows).drop_columns([column])
        yield (
            [_partition_folder(column, value)],
            piece.replace_schema_metadata({_PARTITION_KEY: sink.getvalue().to_pybytes()}),
        )


def _partition_folder(column: str, value: pa.Scalar) -> str:
    """Hive's way of naming: readers with hive partitioning find the column again."""
    text = quote(str(value.as_py()), safe=" ,()") if value.is_valid else "__HIVE_DEFAULT_PARTITION__"
    return f"{quote(column, safe='')}={text}"


def _range(folder: RunFolder, path: str, numbering: RowNumbering) -> tuple[int, int]:
    """First and last index in a fragment, from its footer, or from its rows where an older part became one."""
    metadata = folder.metadata(path).metadata or {}
    if _RANGE_KEY in metadata:
        first, last = json.loads(metadata[_RANGE_KEY])
        return first, last
    indices = _indices(folder.read(path, PLACE_SCHEMA.names), numbering)
    return (int(indices.min()), int(indices.max())) if len(indices) else (0, -1)


def _part(
    folder: RunFolder,
    sources: Sequence[tuple[str, int, int]],
    numbering: RowNumbering,
    schema: pa.Schema,
    start: int,
    stop: int,
) -> pa.Table:
    """Rows [start, stop) in order, one result each."""

    def read(path: str) -> pa.Table:
        table = folder.read(path)
        indices = _indices(table, numbering)
        return table.filter(pa.array((indices >= start) & (indices < stop))).select(schema.names).cast(schema)

    pieces = list(folder.in_order(read, [path for path, first, last in sources if last >= start and first < stop]))
    if not pieces:
        return schema.empty_table()
    table = pa.concat_tables(pieces)
    ok = pc.equal(table.column("status"), Status.OK.value).to_numpy(zero_copy_only=False)
    rank = table.column("attempts").to_numpy().astype(np.int64) * 2 + ok
    # An answer is never given up for a later error: rank it above any number of attempts.
    rank[ok] += np.int64(1) << 40
    return table.take(pa.array(_latest(_indices(table, numbering), rank)))


def count_errors(folder: RunFolder) -> Counter[str]:
    """How many of a run's rows failed, by error type."""

    def count(path: str) -> Counter[str]:
        types = folder.read(path, ["error_type"], encoded=("error_type",)).column("error_type")
        return Counter({pair["values"]: pair["counts"] for pair in pc.value_counts(types.drop_null()).to_pylist()})

    paths = folder.parts() if folder.is_finished() else folder.fragments()
    return sum(folder.in_order(count, paths), Counter())


def iter_results(folder: RunFolder, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """A run's rows, file by file: the parts of a finished run, the fragments of one under way."""
    for path in folder.parts() if folder.is_finished() else folder.fragments():
        yield folder.read(path, columns)
