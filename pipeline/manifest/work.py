"""Plan and read units of work: the manifest's rows less the finished ones.

Units are large at first and shrink towards the end (guided self-scheduling), so that a big job has few of them and
no actor is left alone with a long one. Knows manifests and sets of rows; not Ray, nor what is done with a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.manifest.files import Manifest, ManifestSpec, WorkUnit
from pipeline.manifest.formats import read_units
from pipeline.manifest.row_set import Indices, RowNumbering, RowSet
from pipeline.schema import UnitColumn

_UNITS_PER_ACTOR = 4
"""A unit takes at most 1 / (actors * this) of the rows that remain, but `min_rows` at least."""
_MAX_UNITS = 8192
"""About this many units at most in a job: each costs the driver a millisecond and some kilobytes."""
_UNIT_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class Retries:
    """Rows that have failed before."""

    indices: Indices
    """Ascending."""
    attempts: npt.NDArray[np.int32]
    """Attempts so far."""

    def next_attempts(self, indices: Indices) -> npt.NDArray[np.int32]:
        """Which attempt each row [n] is at now; 1 for those that have not failed."""
        attempts = np.ones(len(indices), np.int32)
        positions = np.searchsorted(self.indices, indices)
        has_failed = np.searchsorted(self.indices, indices, side="right") > positions
        attempts[has_failed] += self.attempts[positions[has_failed]]
        return attempts


def plan_work(
    manifest: Manifest,
    numbering: RowNumbering,
    done: RowSet,
    *,
    actors: int,
    min_rows: int,
    max_rows: int,
    retries: Retries | None = None,
) -> Iterator[WorkUnit]:
    """Units over all rows that are not done, in manifest order. Holds the bits of one file at a time."""
    remaining = numbering.num_rows - len(done)
    largest = max(max_rows, remaining // _MAX_UNITS)
    for number, file in enumerate(manifest.files):
        first, stop = int(numbering.first[number]), int(numbering.first[number + 1])
        todo = np.flatnonzero(~done.mask(first, stop))
        row_bytes = file.size / max(1, file.num_rows)
        max_by_bytes = max(1, int(_UNIT_BYTES / max(row_bytes, 1)))
        position = 0
        while position < len(todo):
            share = remaining // (actors * _UNITS_PER_ACTOR)
            size = max(1, min(max(share, min_rows), largest, max_by_bytes))
            rows = todo[position : position + size]
            for edge in file.large_groups[file.section(int(rows[0])) :][:1]:
                rows = rows[rows < edge]  # a unit lies in one large row group, or in none
            unit = manifest.unit(number, int(rows[0]), int(rows[-1]) + 1)
            selected = None if unit.num_rows == len(rows) else rows
            attempts = None if retries is None else retries.next_attempts(rows + first)
            yield replace(unit, selected=selected, attempts=attempts)
            position += len(rows)
            remaining -= len(rows)


def bundles(units: Iterable[WorkUnit]) -> list[list[WorkUnit]]:
    """Units that are best read in one pass, in manifest order: those of one large row group."""
    found: list[list[WorkUnit]] = []
    for unit in units:
        last = found[-1][-1] if found else None
        if last is not None and unit.shared is not None and (last.file, last.shared) == (unit.file, unit.shared):
            found[-1].append(unit)
        else:
            found.append([unit])
    return found


def read_work(spec: ManifestSpec, unit: WorkUnit, columns: Sequence[str]) -> pa.Table:
    """The rows to run, with their row keys: the manifest's columns and those of `UnitColumn`."""
    (table,) = read_works(spec, [unit], columns)
    return table


def read_works(spec: ManifestSpec, units: Sequence[WorkUnit], columns: Sequence[str]) -> Iterator[pa.Table]:
    """A table for each of several, which come in manifest order, in one pass over each file."""
    runs = [_runs(unit) for unit in units]
    tables = read_units(spec, [run for of_unit in runs for run in of_unit], columns=columns)
    for unit, of_unit in zip(units, runs, strict=True):
        table = pa.concat_tables(itertools.islice(tables, len(of_unit)), promote_options="default")
        attempts = np.ones(unit.num_rows, np.int32) if unit.attempts is None else unit.attempts
        table = table.append_column(UnitColumn.FILE, pa.array(np.full(unit.num_rows, unit.file, np.int32)))
        table = table.append_column(UnitColumn.ROW, pa.array(unit.rows))
        yield table.append_column(UnitColumn.ATTEMPTS, pa.array(attempts))


def _runs(unit: WorkUnit) -> list[WorkUnit]:
    """Contiguous runs of the rows: a few rows to retry may lie far apart, with large rows between them."""
    if unit.selected is None:
        return [unit]
    breaks = np.flatnonzero(np.diff(unit.selected) > 1) + 1
    runs = np.split(unit.selected, breaks)
    return [replace(unit, start=int(run[0]), stop=int(run[-1]) + 1, selected=None) for run in runs]
