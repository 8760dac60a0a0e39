"""Values of manifest rows in Python: from Arrow and JSON, which of them are null, and how texts and messages show them.

Arrow and Parquet hold what Python can't: text in Latin-1, dates after the year 9999, time zones that this machine does
not know. Such a value is the error of a row that needs it, and of no other: `ManifestRow` converts only what it is
asked for.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa

from pipeline.errors import MessageError
from pipeline.schema import UnitColumn

_LARGEST_EXACT = 2.0**53
"""Floats beyond it are not exact integers, whatever they look like."""


class ManifestRow(Mapping[str, Any]):
    """A manifest row as a mapping from columns to values. Asking for one that Python can't hold is a MessageError."""

    def __init__(self, batch: pa.RecordBatch, number: int) -> None:
        self._batch, self._number = batch, number

    @property
    def key(self) -> tuple[int, int]:
        """(manifest file, row in it)."""
        return int(self[UnitColumn.FILE]), int(self[UnitColumn.ROW])

    def __getitem__(self, name: str) -> Any:
        index = self._batch.schema.get_field_index(name)
        if index < 0:
            raise KeyError(name)
        return python_value(self._batch.column(index)[self._number], f"the column {name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.schema.names)

    def __len__(self) -> int:
        return len(self._batch.schema.names)


def manifest_rows(table: pa.Table) -> Iterator[ManifestRow]:
    """The rows of a table, in order."""
    return (ManifestRow(batch, number) for batch in table.to_batches() for number in range(batch.num_rows))


def python_value(value: pa.Scalar, where: str) -> Any:
    """An Arrow value in Python, sixteen fixed bytes as the UUID that they are. Raises MessageError."""
    try:
        found = value.as_py()
    except Exception as error:  # of many kinds: ValueError, OverflowError, KeyError, ArrowException, ImportError
        reason = str(error) or type(error).__name__
        if isinstance(error, UnicodeDecodeError):
            reason += "; write the column again in UTF-8"
        raise MessageError(f"{where} holds a value of type {value.type} that can't be read: {reason}") from error
    return UUID(bytes=found) if value.type == pa.binary(16) and found is not None else found


def readable(value: pa.Scalar, where: str) -> Any:
    """The same for people to look at: of a value that Python can't hold, the sentence that says so."""
    try:
        return python_value(value, where)
    except MessageError as error:
        return f"({error})"


def readable_rows(rows: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows for people to look at."""
    columns = [[readable(value, name) for value in rows.column(name)] for name in rows.schema.names]
    return [dict(zip(rows.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def from_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also for half a surrogate pair, which no valid text holds."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds {error.object[error.start]!r}, half of a character") from error
    return value


def plain(value: Any) -> Any:
    """The value with NaN as None, which is how pandas writes a null number; tuples as lists, NumPy's as Python's."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and math.isnan(value):
        return None
    return list(value) if isinstance(value, tuple) else value


def is_null(value: Any) -> bool:
    """Whether it is null, or a struct of nothing but nulls, which is how some writers spell a null struct."""
    if isinstance(value, dict):
        return all(is_null(inner) for inner in value.values())
    return plain(value) is None


def is_empty(value: Any) -> bool:
    """Null or nothing, as Arrow and other writers pad the parts of a message."""
    return is_null(value) or (isinstance(value, str | bytes | list) and not value)


def as_text(value: Any) -> str | None:
    """Text, a number, a date or a UUID as text; None for any other value.

    A whole number is written without a point: pandas makes floats of integers beside a null, warehouses decimals.
    """
    if isinstance(value, Decimal):
        return str(int(value)) if value == value.to_integral_value() else format(value, "f")
    if isinstance(value, float) and abs(value) < _LARGEST_EXACT and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, str | int | float | date | time | timedelta | UUID) else None


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 5, 80, 80, 80


def shown(value: Any) -> str:
    """A value for an error message: short, whatever it is."""
    if value is None:
        return "null"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
