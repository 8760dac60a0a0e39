"""Values of manifest rows, as Arrow gives them to Python: which of them are null, and how messages show them."""

from __future__ import annotations

import math
from typing import Any


def plain(value: Any) -> Any:
    """The value with NaN as None, which is how pandas writes a null number, and with tuples as lists."""
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


def shown(value: Any) -> str:
    """A value for an error message: short, whatever it is."""
    if value is None:
        return "null"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
