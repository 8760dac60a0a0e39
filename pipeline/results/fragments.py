"""Fragments: finished rows are collected and published during the run."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.manifest.row_set import RowNumbering, RowSet
from pipeline.results import result_files
from pipeline.results.result_files import as_schema, by_bytes, read_footer, row_indices, write_table
from pipeline.results.run_folder import RunFolder

_RANGE_KEY = b"qwen2_vl_batch.range"


def write_fragment(folder: RunFolder, name: str, table: pa.Table, numbering: RowNumbering) -> None:
    """Publish rows in order of their index; the footer says which indices the fragment spans."""
    indices = row_indices(table, numbering)
    order = np.argsort(indices, kind="stable")
    span = json.dumps([int(indices[order[0]]), int(indices[order[-1]])]).encode()
    table = table.take(pa.array(order)).replace_schema_metadata({_RANGE_KEY: span})
    write_table(folder, folder.file("fragments", f"{name}.parquet"), table)


def read_range(folder: RunFolder, path: str) -> tuple[int, int]:
    """First and last index in a fragment."""
    first, last = json.loads(read_footer(folder, path).metadata[_RANGE_KEY])
    return first, last


@dataclass
class FragmentWriter:
    """Collects finished rows and publishes a fragment once they are many or large, or once the oldest has waited."""

    folder: RunFolder
    numbering: RowNumbering
    schema: pa.Schema
    rows_per_fragment: int
    seconds_per_fragment: float
    _waiting: list[pa.Table] = field(default_factory=list)
    _oldest: float = 0.0
    _run: str = field(default_factory=lambda: f"{time.time_ns() // 1_000_000}-{secrets.token_hex(3)}")
    _num_written: int = 0

    def add(self, table: pa.Table) -> None:
        """Take finished rows; publish when there are enough of them. Raises OutputError."""
        if not table.num_rows:
            return
        if not self._waiting:
            self._oldest = time.monotonic()
        self._waiting.append(as_schema(table, self.schema))
        many = sum(waiting.num_rows for waiting in self._waiting) >= self.rows_per_fragment
        if many or sum(waiting.nbytes for waiting in self._waiting) >= result_files.MAX_TABLE_BYTES:
            self.flush()

    def flush_if_old(self) -> None:
        """Publish when the oldest row has waited long enough. Raises OutputError."""
        if self._waiting and time.monotonic() - self._oldest >= self.seconds_per_fragment:
            self.flush()

    def flush(self) -> None:
        """Publish what waits. Raises OutputError; the rows are kept, so that another try may succeed."""
        if not self._waiting:
            return
        for table in by_bytes(pa.concat_tables(self._waiting)):
            write_fragment(self.folder, f"{self._run}-{self._num_written:06d}", table, self.numbering)
            self._num_written += 1
        self._waiting = []


def take_new(table: pa.Table, numbering: RowNumbering, done: RowSet) -> pa.Table:
    """The rows that are not in `done` yet, each once, which are added to it.

    After a node is lost, Ray may deliver a row twice.
    """
    indices = row_indices(table, numbering)
    is_first = np.zeros(len(indices), dtype=bool)
    is_first[np.unique(indices, return_index=True)[1]] = True
    is_new = is_first & ~done.has(indices)
    done.add(indices)
    return table if is_new.all() else table.filter(pa.array(is_new))
