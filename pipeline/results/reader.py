"""Reading a run folder: run.json, scores, progress, and the result rows a batch at a time.

A finished run's rows are its parts, in manifest order; those of any other run are its fragments. Rows are numbered in
this order from 0, and `fetch` finds them by that number. Memory holds one batch, and of overlapping fragments about 16
bytes a row. Knows files and schemas; not what the rows are read for.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.preprocess.messages.values import readable_rows
from pipeline.results.result_files import (
    count_values,
    is_answered,
    read_footer,
    read_in_order,
    read_table,
    restore_partition,
    schema_with_partition,
    winners,
)
from pipeline.results.run_folder import RunFolder
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW

Ints = npt.NDArray[np.int64]

_BATCH_ROWS = 16_384


def row_key(file: int, row: int) -> int:
    """A row's place in the manifest as one number: no file has 2**40 rows."""
    return file << 40 | row


def row_keys(rows: pa.RecordBatch | pa.Table) -> Ints:
    """The keys of all rows, int64."""
    files = np.asarray(rows.column(MANIFEST_FILE), np.int64)
    keys: Ints = files << 40 | np.asarray(rows.column(MANIFEST_ROW), np.int64)
    return keys


def count_errors(folder: RunFolder) -> Counter[str]:
    """How many of a run's rows failed, by error type."""

    def count(path: str) -> Counter[str]:
        return count_values(read_table(folder, path, ["error_type"], encoded=["error_type"]).column("error_type"))

    return sum(read_in_order(folder, count, folder.result_files()), Counter())


@dataclass(frozen=True)
class _ResultFile:
    """A part, a fragment, or the score rows."""

    path: str
    counted: npt.NDArray[np.bool_] | None = None
    """Which of its rows count; None: all."""


class RunReader:
    """A run folder, on disk or in a bucket. Raises OutputError where there is none."""

    def __init__(self, path: str, storage_options: storage.StorageOptions = None) -> None:
        self._folder = RunFolder(path, storage_options)
        self.path = self._folder.path
        found = self._folder.read_run()
        self.run: dict[str, Any] = found or {}
        self.metrics: dict[str, Any] | None = self._folder.read_json("metrics.json")
        self.is_finished = self._folder.is_finished()
        try:
            self._files = self._result_files()
        except OSError as error:
            raise OutputError(f"can't read {self.path}: {error}") from error
        if not self._files and found is None:
            raise OutputError(
                f"{self.path} is not a run folder: "
                "expected __run/run.json, and part-*.parquet or __run/fragments/*.parquet"
            )
        self.columns: tuple[str, ...] = ()
        if self._files:
            self.columns = tuple(schema_with_partition(self._open(self._files[0]).schema_arrow).names)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return storage.name(storage.absolute(self.path))

    @property
    def num_rows(self) -> int:
        """Result rows, each manifest row counted once."""
        return sum(self._file_sizes)

    @cached_property
    def has_scores(self) -> bool:
        """Whether the rows were scored."""
        return storage.exists(self._scores.path, self._folder.storage_options)

    def progress(self) -> list[dict[str, Any]]:
        """The lines of progress.jsonl. Broken ones, from a crash while writing, are left out."""
        try:
            text = storage.read_bytes(self._folder.file("progress.jsonl"), self._folder.storage_options)
        except OSError:
            return []
        lines = []
        for line in text.decode("utf-8", "replace").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get("t"), int | float):
                lines.append(value)
        return lines

    def batches(self, columns: Collection[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All rows, a few thousand at a time; columns that the files do not have are left out."""
        for file in self._files:
            yield from self._batches(file, columns)

    def first_batches(self, columns: Collection[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Some rows of each partition; of a run without partitions, its first ones."""
        first: dict[str, _ResultFile] = {}
        for file in self._files:
            first.setdefault(storage.parent(file.path), file)
        for file in first.values():
            yield from itertools.islice(self._batches(file, columns), 1)

    def score_batches(self, columns: Collection[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The score rows, in the order of `batches` at the time of scoring."""
        return self._batches(self._scores, columns)

    def find(self, keys: Collection[int]) -> dict[int, int]:
        """The numbers of the rows with these keys (`row_key`); keys that no row has are left out."""
        wanted, first = np.array(sorted(keys), np.int64), 0
        found: dict[int, int] = {}
        for batch in self.batches((MANIFEST_FILE, MANIFEST_ROW)) if keys else ():
            known = row_keys(batch)
            found |= {int(known[row]): first + int(row) for row in np.flatnonzero(np.isin(known, wanted))}
            first += len(batch)
        return found

    def fetch(self, numbers: Collection[int]) -> dict[int, dict[str, Any]]:
        """A few rows by their number, without values that hold whole files or a number for each token."""
        found: dict[int, dict[str, Any]] = {}
        first = 0
        for file, size in zip(self._files, self._file_sizes, strict=True):
            inside = sorted(number for number in numbers if first <= number < first + size)
            rows = [number - first for number in inside]
            if file.counted is not None:
                rows = np.flatnonzero(file.counted)[rows].tolist()
            found |= zip(inside, self._take(file, rows), strict=True)
            first += size
        return found

    def fetch_scores(self, numbers: Collection[int]) -> dict[int, dict[str, Any]]:
        """The score rows of a few rows; none if the run was not scored."""
        inside = sorted(numbers) if self.has_scores else []
        return dict(zip(inside, self._take(self._scores, inside), strict=True))

    @property
    def _scores(self) -> _ResultFile:
        return _ResultFile(self._folder.file("scores.parquet"))

    @cached_property
    def _file_sizes(self) -> list[int]:
        """Rows of each file that count."""
        paths = [file.path for file in self._files]
        footers = read_in_order(self._folder, lambda path: read_footer(self._folder, path), paths)
        return [
            footer.num_rows if file.counted is None else int(file.counted.sum())
            for file, footer in zip(self._files, footers, strict=True)
        ]

    def _result_files(self) -> list[_ResultFile]:
        paths = [] if self.is_finished else self._folder.fragments()
        if not paths:
            return [_ResultFile(path) for path in self._folder.parts()]
        # Fragments may overlap after a crash or a retry; a row counts once.
        columns = (MANIFEST_FILE, MANIFEST_ROW, "status", "attempts")
        tables = read_in_order(self._folder, lambda path: read_table(self._folder, path, columns), paths)
        found = [(row_keys(table), is_answered(table), table.column("attempts").to_numpy()) for table in tables]
        keys, answered, attempts = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        counted = np.zeros(len(keys), np.bool_)
        counted[winners(keys, answered, attempts)] = True
        pieces = np.split(counted, np.cumsum([len(of_file) for of_file, _, _ in found])[:-1])
        return [_ResultFile(path, None if mine.all() else mine) for path, mine in zip(paths, pieces, strict=True)]

    def _open(self, file: _ResultFile) -> pq.ParquetFile:
        options = self._folder.storage_options
        try:
            if storage.is_remote(file.path):
                return pq.ParquetFile(storage.open_input(file.path, options, random_access=True))
            return pq.ParquetFile(storage.local_path(file.path))
        except (OSError, pa.ArrowException) as error:
            raise OutputError(f"can't read {file.path}: {error}") from error

    def _batches(self, file: _ResultFile, columns: Collection[str] | None) -> Iterator[pa.RecordBatch]:
        parquet = self._open(file)
        start = 0
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=_stored(parquet, columns)):
            rows = restore_partition(batch, parquet.schema_arrow, columns)
            if file.counted is not None:
                rows = rows.filter(pa.array(file.counted[start : start + len(batch)]))
            start += len(batch)
            if len(rows):
                yield rows

    def _take(self, file: _ResultFile, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """These rows of a file, in ascending order. Only the row groups that hold them are read."""
        if not rows:
            return
        parquet = self._open(file)
        columns = [field.name for field in schema_with_partition(parquet.schema_arrow) if _is_small(field)]
        start = 0
        for group in range(parquet.num_row_groups):
            stop = start + parquet.metadata.row_group(group).num_rows
            inside = [row - start for row in rows if start <= row < stop]
            if inside:
                table = parquet.read_row_group(group, columns=_stored(parquet, columns)).take(pa.array(inside))
                yield from readable_rows(restore_partition(table, parquet.schema_arrow, columns))
            start = stop


def _stored(parquet: pq.ParquetFile, columns: Collection[str] | None) -> list[str]:
    """Those of these columns that the file itself holds; None: all."""
    return [name for name in parquet.schema_arrow.names if columns is None or name in columns]


def _is_small(field: pa.Field) -> bool:
    return field.name not in ("logprobs", "texts") and not _holds_bytes(field.type)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether values may be whole files, as in kept image columns."""
    if kind.num_fields:
        return any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
