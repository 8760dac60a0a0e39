"""Columns that stand in the names of folders, as Hive, Spark and DuckDB write them: `year=2024/month=01/x.parquet`.

They are the same for every row of a file. A column that the files have themselves is read from them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import unquote

import pyarrow as pa

from pipeline.manifest.files import Manifest, ManifestSpec, WorkUnit, relative

_NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")
"""As a number is written. `007` is text, and `01` too: nobody can tell what it was."""


def with_partitions(manifest: Manifest) -> Manifest:
    """The manifest with the columns that its files' folders name behind the files' own: integers where all values are
    some, else text."""
    found: dict[str, set[str | None]] = {}
    for file in manifest.files:
        for name, value in _values(file.path, manifest.base).items():
            if name not in manifest.schema.names:
                found.setdefault(name, set()).add(value)
    schema = manifest.schema
    for name, values in found.items():
        whole = all(value is None or _INTEGER.fullmatch(value) for value in values)
        schema = schema.append(pa.field(name, pa.int64() if whole and values != {None} else pa.string()))
    return replace(manifest, schema=schema, partitions=tuple(found))


def append_partitions(table: pa.Table, spec: ManifestSpec, unit: WorkUnit, names: Sequence[str]) -> pa.Table:
    """A unit's rows with those of the named columns that its folders name."""
    wanted = [name for name in names if name in spec.partitions]
    if not wanted:
        return table
    columns = {name: table.column(name) for name in table.column_names}
    values = _values(unit.path, spec.base)
    for name in wanted:
        value = pa.scalar(values.get(name), pa.string()).cast(spec.schema.field(name).type)
        columns[name] = pa.repeat(value, unit.num_rows)
    return pa.table({name: columns[name] for name in (*names, *(set(columns) - set(names)))})


def _values(path: str, base: str) -> dict[str, str | None]:
    """What the folders between the base and the file name."""
    values: dict[str, str | None] = {}
    for folder in relative(path, base).split("/")[:-1]:
        name, equals, value = map(unquote, folder.partition("="))
        if name and equals:
            values[name] = None if value == _NULL else value
    return values
