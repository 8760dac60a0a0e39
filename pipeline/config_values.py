"""Kinds of values in the config: numbers with bounds, paths and URIs, sizes of pools; how they are read and written.

Knows no sections or keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from pipeline.storage import EXTRAS, two_slashes

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _names_a_place(path: str) -> str:
    scheme, slashes, place = path.partition("://")
    if not path.strip():
        raise ValueError("it is empty (an unset variable?); a path or URI is needed")
    if scheme in EXTRAS and slashes and (not place or place.startswith("/")):
        raise ValueError(f"{path} names no bucket (an unset variable?); a URI is like {scheme}://BUCKET/FOLDER")
    if uri := two_slashes(path):
        raise ValueError(f"{path} would be taken for a local file; a URI has two slashes: {uri}")
    return path


Location = Annotated[str, AfterValidator(_names_a_place)]
"""A path on disk or a URI."""


@dataclass(frozen=True)
class PoolSize:
    """Fewest and most actors of a stage; equal where the number is fixed."""

    min_size: int
    max_size: int


def _pool_size(value: Any) -> Any:
    """`4` or `2,16` as a person writes it."""
    if isinstance(value, PoolSize) or value is None:
        return value
    words = [word.strip() for word in value.split(",")] if isinstance(value, str) else [value]
    try:
        numbers = [int(word) for word in words]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (1, 2) or numbers[0] < 1 or numbers[-1] < numbers[0]:
        raise ValueError(f"found {value!r}; allowed: a number from 1 on, or fewest and most as in 2,16")
    return PoolSize(numbers[0], numbers[-1])


def _written_pool_size(pool: PoolSize | None) -> Any:
    if pool is None or pool.min_size == pool.max_size:
        return pool and pool.min_size
    return f"{pool.min_size},{pool.max_size}"


Pool = Annotated[PoolSize | None, BeforeValidator(_pool_size), PlainSerializer(_written_pool_size)]
