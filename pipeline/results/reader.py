"""Reading a run folder for its report: run.json, scores, progress, and the result rows in bounded memory.

A finished run's rows are its parts; a run under way, or one that broke off, shows its fragments, where a row that
stands in several counts once. Knows files and schemas; not what a page looks like.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.results.result_files import count_values, read_in_order, read_table
from pipeline.results.run_folder import RunFolder
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, Status

Ints = npt.NDArray[np.int64]

_BATCH_ROWS = 16_384
# Never needed on a page, and large.
_NOT_SHOWN = frozenset({"logprobs", "texts"})


class Position(NamedTuple):
    """Where a result row lies: number of the results file, and row in it."""

    file: int
    row: int


@dataclass(frozen=True)
class ResultFile:
    """One part or fragment."""

    path: str
    num_rows: int
    counted: npt.NDArray[np.bool_] | None = None
    """Which of its rows count; None: all."""


@dataclass(frozen=True)
class ResultBatch:
    """Some rows of one file, and their row numbers there."""

    file: int
    rows: Ints
    batch: pa.RecordBatch


def place_keys(batch: pa.RecordBatch) -> Ints:
    """Places in the manifest as one number each."""
    file = np.asarray(batch.column(MANIFEST_FILE), np.int64)
    keys: Ints = file << 40 | np.asarray(batch.column(MANIFEST_ROW), np.int64)
    return keys


def place_key(file: int, row: int) -> int:
    """The same for one place."""
    return file << 40 | row


_PART = re.compile(r"([^/]+=[^/]*/)?part-[^/]*\.parquet")
"""A part of the run itself; the folder may hold other runs' folders, such as the canaries'."""


class RunReader:
    """A run folder, on disk or in a bucket. Raises OutputError where there is none."""

    def __init__(self, path: str, storage_options: storage.StorageOptions = None) -> None:
        self.path = path.rstrip("/") or path
        self.storage_options = storage_options
        found = self._json("run.json")
        self.run: dict[str, Any] = found or {}
        self.metrics: dict[str, Any] | None = self._json("metrics.json")
        self.is_finished = storage.exists(self._file("_SUCCESS"), storage_options)
        self.files = self._result_files()
        if not self.files and found is None:
            raise OutputError(
                f"{self.path} is no run folder: expected run.json, and part-*.parquet or fragments/*.parquet"
            )
        names = self.files[0].path if self.files else None
        self.columns: tuple[str, ...] = self._schema_names(names) if names else ()

    @property
    def name(self) -> str:
        """The folder's own name."""
        return storage.name(storage.absolute(self.path))

    @property
    def num_rows(self) -> int:
        """Result rows that count."""
        return sum(file.num_rows if file.counted is None else int(file.counted.sum()) for file in self.files)

    @property
    def has_scores(self) -> bool:
        """Whether the rows were scored."""
        return storage.exists(self._file("scores.parquet"), self.storage_options)

    def _file(self, *names: str) -> str:
        return storage.join(self.path, *names)

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            values = json.loads(storage.read_bytes(self._file(name), self.storage_options))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(f"can't read {self._file(name)}: {error}") from error
        if not isinstance(values, dict):
            raise OutputError(f"{self._file(name)} holds a {type(values).__name__}; expected an object")
        return values

    def progress(self) -> list[dict[str, Any]]:
        """The lines of progress.jsonl; broken ones (a crash while writing) are passed over."""
        try:
            text = storage.read_bytes(self._file("progress.jsonl"), self.storage_options).decode("utf-8", "replace")
        except OSError:
            return []
        lines = []
        for line in text.splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get("t"), int | float):
                lines.append(value)
        return lines

    def _result_files(self) -> tuple[ResultFile, ...]:
        try:
            # Below the folder too: parts may be partitioned by a column.
            found = storage.list_files(self.path, self.storage_options)
            below = len(self.path.rstrip("/")) + 1
            parts = [info.path for info in found if _PART.fullmatch(info.path[below:])]
            if parts and self.is_finished:
                return tuple(self._result_file(path) for path in parts)
            inner = storage.list_files(self._file("fragments"), self.storage_options)
        except OSError as error:
            raise OutputError(f"can't read {self.path}: {error}") from error
        fragments = [self._result_file(info.path) for info in inner if info.path.endswith(".parquet")]
        if not fragments:
            return tuple(self._result_file(path) for path in parts)
        return tuple(self._without_repeats(fragments))

    def _result_file(self, path: str) -> ResultFile:
        return ResultFile(path, self._open(path).metadata.num_rows)

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            if storage.is_remote(path):
                return pq.ParquetFile(storage.open_input(path, self.storage_options, random_access=True))
            return pq.ParquetFile(storage.local_path(path))
        except (OSError, pa.ArrowException) as error:
            raise OutputError(f"can't read {path}: {error}") from error

    def _schema_names(self, path: str) -> tuple[str, ...]:
        return tuple(self._open(path).schema_arrow.names)

    def _without_repeats(self, fragments: Sequence[ResultFile]) -> Iterator[ResultFile]:
        """Fragments may overlap after a crash or a retry: an answer wins over an error, then the latest attempt."""
        keys, ranks = [], []
        for file in fragments:
            table = self._open(file.path).read([MANIFEST_FILE, MANIFEST_ROW, "status", "attempts"])
            for batch in table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]:
                keys.append(place_keys(batch))
                answered = np.asarray(batch.column("status").to_numpy(zero_copy_only=False) == Status.OK.value)
                ranks.append(np.asarray(batch.column("attempts"), np.int64) + (answered.astype(np.int64) << 40))
        all_keys, all_ranks = np.concatenate(keys), np.concatenate(ranks)
        order = np.lexsort((all_ranks, all_keys))
        last = np.append(np.diff(all_keys[order]) != 0, True)[: len(order)]
        counted = np.zeros(len(all_keys), bool)
        counted[order[last]] = True
        start = 0
        for file in fragments:
            mine = counted[start : start + file.num_rows]
            start += file.num_rows
            yield ResultFile(file.path, file.num_rows, None if mine.all() else mine)

    def batches(self, columns: Collection[str] | None = None) -> Iterator[ResultBatch]:
        """All rows that count, a few thousand at a time; columns that the files do not have are left out."""
        wanted = None if columns is None else [name for name in self.columns if name in columns]
        for number, file in enumerate(self.files):
            start = 0
            for batch in self._open(file.path).iter_batches(_BATCH_ROWS, columns=wanted):
                rows = np.arange(start, start + len(batch))
                start += len(batch)
                if file.counted is not None:
                    kept = file.counted[rows]
                    rows, batch = rows[kept], batch.filter(pa.array(kept))
                if len(batch):
                    yield ResultBatch(number, rows, batch)

    def score_batches(self, columns: Collection[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The score rows, in the order of `batches` at the time of scoring."""
        file = self._open(self._file("scores.parquet"))
        wanted = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
        yield from file.iter_batches(_BATCH_ROWS, columns=wanted)

    def fetch(self, positions: Collection[Position]) -> dict[Position, dict[str, Any]]:
        """A few rows with everything a page may show, reading only the row groups that hold them."""
        found: dict[Position, dict[str, Any]] = {}
        for number, file in enumerate(self.files):
            wanted = sorted({position.row for position in positions if position.file == number})
            if not wanted:
                continue
            parquet = self._open(file.path)
            shown = [field.name for field in parquet.schema_arrow if _is_shown(field)]
            start = 0
            for group in range(parquet.num_row_groups):
                stop = start + parquet.metadata.row_group(group).num_rows
                inside = [row for row in wanted if start <= row < stop]
                if inside:
                    table = parquet.read_row_group(group, columns=shown)
                    rows = table.take(pa.array([row - start for row in inside])).to_pylist()
                    found |= {Position(number, row): values for row, values in zip(inside, rows, strict=True)}
                start = stop
        return found


def _is_shown(field: pa.Field) -> bool:
    return field.name not in _NOT_SHOWN and not _holds_bytes(field.type)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether values may carry whole files, as kept image columns do."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def iter_results(folder: RunFolder, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """A run's rows, file by file: the parts of a finished run, the fragments of any other."""
    for path in folder.result_files():
        yield read_table(folder, path, columns)


def count_errors(folder: RunFolder) -> Counter[str]:
    """How many of a run's rows failed, by error type."""

    def count(path: str) -> Counter[str]:
        return count_values(read_table(folder, path, ["error_type"], encoded=["error_type"]).column("error_type"))

    return sum(read_in_order(folder, count, folder.result_files()), Counter())
