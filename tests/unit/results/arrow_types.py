"""Columns of every Arrow type, alone and inside lists, structs and maps."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

NUM_ROWS = 7

_TEXT = ["", "a", "b/c" * 20, "ü", "a"]
_BYTES = [b"", b"\xff\xfe", b"x" * 40, b"a", b"a"]
_NUMBERS = [0, 1, 127, 1, 5]
_FLOATS = [0.0, -0.0, float("nan"), 1.5, float("inf")]
_DECIMALS = [Decimal("1.25"), Decimal("-999.99"), Decimal("0.00"), Decimal("1.25"), Decimal("7.00")]
_DATES = [datetime.date(1, 1, 1), datetime.date(2026, 2, 28), datetime.date(9999, 12, 31)] + [
    datetime.date(1970, 1, 1)
] * 2
_TIMES = [datetime.time(), datetime.time(23, 59, 59), datetime.time(1, 2, 3)] + [datetime.time(12)] * 2
_EPOCHS = [0, 1, 10**9, -1, 1]
_LATE = [0, 3_000_000, 10_957, -800_000, 3_000_000]
"""Days since 1970; some lie after the year 9999 or before the year 1, which Python's dates can't hold."""

_VALUES: list[tuple[pa.DataType, list[Any]]] = [
    (pa.null(), [None] * 5),
    (pa.bool_(), [True, False, True, True, False]),
    *((kind(), _NUMBERS) for kind in (pa.int8, pa.int16, pa.int32, pa.int64)),
    *((kind(), _NUMBERS) for kind in (pa.uint8, pa.uint16, pa.uint32)),
    (pa.uint64(), [0, 2**64 - 1, 1, 1, 5]),
    *((kind(), _FLOATS) for kind in (pa.float16, pa.float32, pa.float64)),
    *((kind(5, 2), _DECIMALS) for kind in (pa.decimal32, pa.decimal64, pa.decimal128, pa.decimal256)),
    *((kind(), _TEXT) for kind in (pa.string, pa.large_string, pa.string_view)),
    *((kind(), _BYTES) for kind in (pa.binary, pa.large_binary, pa.binary_view)),
    (pa.binary(2), [b"ab", b"\xff\xff", b"ab", b"cd", b"\x00\x00"]),
    (pa.date32(), _LATE),
    (pa.date64(), _DATES),
    *((pa.time32(unit), _TIMES) for unit in ("s", "ms")),
    *((pa.time64(unit), _TIMES) for unit in ("us", "ns")),
    *((pa.timestamp(unit), _EPOCHS) for unit in ("s", "ms", "us", "ns")),
    *((pa.timestamp("us", zone), _EPOCHS) for zone in ("UTC", "+02:00", "Europe/Berlin", "Mars/Base")),
    *((pa.duration(unit), _EPOCHS) for unit in ("s", "ms", "us", "ns")),
    (pa.uuid(), [bytes([number] * 16) for number in (0, 255, 1, 1, 7)]),
    (pa.json_(), ["{}", "[1]", "null", "{}", "3"]),
    (pa.bool8(), [0, 1, 1, 0, 1]),
]


def _array(kind: pa.DataType, values: list[Any]) -> pa.Array:
    storage = getattr(kind, "storage_type", kind)
    array = pa.array(values, pa.int32()).cast(storage) if kind == pa.date32() else pa.array(values, storage)
    return array if storage is kind else pa.ExtensionArray.from_storage(kind, array)


def columns() -> Iterator[tuple[str, pa.Array]]:
    """(name, seven values, some of them null) for every type, and for every type inside every other."""
    items = [0, 1, None, 2, 3, 4, None, 0, 1, 2, 3, 4, 0, 1]
    offsets = [0, 2, 2, 3, 6, 9, 13, 14]
    for kind, values in _VALUES:
        inner = _array(kind, values).take(pa.array(items)) if "view" not in str(kind) else _array(
            kind, [None if item is None else values[item] for item in items]
        )  # fmt: skip
        few = inner.slice(1, NUM_ROWS)
        yield str(kind), few
        small, large = pa.array(offsets, pa.int32()), pa.array(offsets, pa.int64())
        sizes = pc.subtract(small[1:], small[:-1])
        yield f"list of {kind}", pa.ListArray.from_arrays(small, inner)
        yield f"large_list of {kind}", pa.LargeListArray.from_arrays(large, inner)
        yield f"list_view of {kind}", pa.ListViewArray.from_arrays(small[:-1], sizes, inner)
        yield f"fixed_size_list of {kind}", pa.FixedSizeListArray.from_arrays(inner, 2)
        yield f"struct of {kind}", pa.StructArray.from_arrays([few, few], ["a", "b"])
        keys = pa.array([f"k{number}" for number in range(len(items))])
        yield f"map of {kind}", pa.MapArray.from_arrays(small, keys, inner)
        codes = pa.array([0, 1, None, 1, 0, 2, 1], pa.int32())
        yield f"dictionary of {kind}", pa.DictionaryArray.from_arrays(codes, inner.slice(3, 3))
