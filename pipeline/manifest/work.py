"""Cut what is still to do into units of work: the manifest's rows less the finished ones.

Units are large at first and shrink towards the end (guided self-scheduling), so that a big job has few of them and
no actor is left alone with a long one. Knows manifests and sets of rows; not Ray, nor what is done with a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.manifest import Manifest, ReadSpec, WorkUnit, read_units, unit_of
from pipeline.manifest.row_set import Indices, RowNumbering, RowSet
from pipeline.schema import UnitColumn

_UNITS_PER_ACTOR = 4
"""Each unit is at most this share of what remains for an actor; the last ones are of `min_rows`."""
_MOST_UNITS = 8192
"""A job has about this many units at most: each costs the driver a millisecond and some kilobytes."""
_UNIT_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class Work:
    """A unit's rows that are to be run."""

    unit: WorkUnit
    wanted: npt.NDArray[np.int64] | None = None
    """Rows to run, counted from the unit's start; None for all of them."""
    attempts: npt.NDArray[np.int32] | None = None
    """The attempt that this is for each wanted row; None: the first."""

    @property
    def num_rows(self) -> int:
        """Rows to run."""
        return self.unit.num_rows if self.wanted is None else len(self.wanted)


@dataclass(frozen=True)
class Retries:
    """Rows that have failed before: index, ascending, and attempts so far."""

    indices: Indices
    attempts: npt.NDArray[np.int32]


def plan_work(
    manifest: Manifest,
    numbering: RowNumbering,
    done: RowSet,
    *,
    actors: int,
    min_rows: int,
    max_rows: int,
    retries: Retries | None = None,
) -> Iterator[Work]:
    """Units over all rows that are not done, in manifest order. One file's bits are looked at at a time."""
    remaining = numbering.num_rows - len(done)
    largest = max(max_rows, remaining // _MOST_UNITS)
    for number, file in enumerate(manifest.files):
        start, stop = int(numbering.first[number]), int(numbering.first[number + 1])
        todo = np.flatnonzero(~done.mask(start, stop))
        row_bytes = file.size / max(1, file.num_rows)
        by_bytes = max(1, int(_UNIT_BYTES / max(row_bytes, 1)))
        position = 0
        while position < len(todo):
            share = remaining // (actors * _UNITS_PER_ACTOR)
            size = max(1, min(max(share, min_rows), largest, by_bytes))
            rows = todo[position : position + size]
            yield _work(manifest, number, rows, start, retries)
            position += len(rows)
            remaining -= len(rows)


def _work(manifest: Manifest, file: int, rows: Indices, first: int, retries: Retries | None) -> Work:
    start, stop = int(rows[0]), int(rows[-1]) + 1
    unit = unit_of(manifest, file, start, stop)
    wanted = None if stop - start == len(rows) else rows - start
    attempts = None
    if retries is not None and len(retries.indices):
        places = np.searchsorted(retries.indices, rows + first)
        places = np.minimum(places, len(retries.indices) - 1)
        again = retries.indices[places] == rows + first
        attempts = np.where(again, retries.attempts[places] + 1, 1).astype(np.int32)
    return Work(unit, wanted, attempts)


def _runs(work: Work) -> list[WorkUnit]:
    """Unbroken runs of wanted rows: a few rows to retry may lie far apart, and what lies between may be large."""
    if work.wanted is None:
        return [work.unit]
    rows = work.unit.start + work.wanted
    breaks = np.flatnonzero(np.diff(rows) > 1) + 1
    return [replace(work.unit, start=int(run[0]), stop=int(run[-1]) + 1) for run in np.split(rows, breaks)]


def read_work(spec: ReadSpec, work: Work, columns: Sequence[str]) -> pa.Table:
    """The wanted rows with their places: the manifest's columns and those of `UnitColumn`."""
    (table,) = read_works(spec, [work], columns)
    return table


def read_works(spec: ReadSpec, works: Sequence[Work], columns: Sequence[str]) -> Iterator[pa.Table]:
    """A table for each of several, which come in manifest order, in one pass over each file."""
    runs = [_runs(work) for work in works]
    tables = read_units(spec, [run for of_work in runs for run in of_work], columns=columns)
    for work, of_work in zip(works, runs, strict=True):
        yield _with_places(pa.concat_tables(itertools.islice(tables, len(of_work))), work)


def _with_places(table: pa.Table, work: Work) -> pa.Table:
    rows = np.arange(work.unit.start, work.unit.stop, dtype=np.int64)
    if work.wanted is not None:
        rows = rows[work.wanted]
    attempts = np.ones(len(rows), np.int32) if work.attempts is None else work.attempts
    table = table.append_column(UnitColumn.FILE, pa.array(np.full(len(rows), work.unit.file, np.int32)))
    table = table.append_column(UnitColumn.ROW, pa.array(rows))
    return table.append_column(UnitColumn.ATTEMPTS, pa.array(attempts))
