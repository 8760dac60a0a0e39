"""Read units of rows, whatever the format."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from pipeline.errors import ManifestError
from pipeline.manifest.files import ERROR_COLUMN, ReadSpec, WorkUnit, first_line
from pipeline.manifest.parquet import read_parquet
from pipeline.manifest.text import read_text


def read_unit(spec: ReadSpec, unit: WorkUnit, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Exactly the unit's rows, in order: the named columns, or all of the manifest's, in the manifest's types.

    JSONL and CSV rows have `_manifest_error` besides. Raises ManifestError.
    """
    (table,) = read_units(spec, [unit], columns=columns)
    return table


def read_units(
    spec: ReadSpec, units: Sequence[WorkUnit], *, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """A table for each of several units, as by `read_unit`, in one pass over each file.

    The units come in manifest order. Neighbours read together cost one look at their row group, where alone each costs
    one; that tells for large row groups, and for the scattered rows of a retry.
    """
    names = list(spec.schema.names if columns is None else dict.fromkeys(columns))
    missing = [name for name in names if name not in spec.schema.names and name != ERROR_COLUMN]
    if missing:
        raise ManifestError(
            f"the manifest has no column {', '.join(missing)}; its columns: {', '.join(spec.schema.names) or 'none'}"
        )
    names = [name for name in names if name != ERROR_COLUMN]
    read: Callable[[ReadSpec, Sequence[WorkUnit], Sequence[str]], Iterator[pa.Table]]
    read = read_text if spec.format in ("jsonl", "csv") else read_parquet
    for _, group in itertools.groupby(units, key=lambda unit: unit.file):
        of_file = list(group)
        assert all(a.stop <= b.start for a, b in itertools.pairwise(of_file)), "units out of order"
        try:
            for unit, table in zip(of_file, read(spec, of_file, names), strict=True):
                assert not table.num_columns or table.num_rows == unit.num_rows, (table.num_rows, unit)
                yield table
        except OSError as error:
            rows = f"{of_file[0].start} to {of_file[-1].stop}"
            raise ManifestError(f"can't read rows {rows} of {of_file[0].path}: {first_line(error)}") from error
