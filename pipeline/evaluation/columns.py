"""Columns of result rows, and values of published datasets, as texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.preprocess.values import readable


def text_column(batch: pa.RecordBatch, name: str | None) -> pa.Array:
    """A column as text; nulls if there is no name."""
    if name is None:
        return pa.nulls(len(batch), pa.string())
    column = batch.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_nested(column.type):
        return _as_texts(column, name)
    try:
        texts = column.cast(pa.string())
        texts.validate(full=True)  # that it is UTF-8, which a writer may have ignored
    except pa.ArrowException:
        return _as_texts(column, name)
    return texts


def _as_texts(column: pa.Array, name: str) -> pa.Array:
    values = (readable(value, f"the column {name}") for value in column)
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def text_lists(batch: pa.RecordBatch, name: str) -> list[list[str]]:
    """Each row's answers or options as texts; empty if the row has none."""
    return [answer_texts(readable(value, f"the column {name}")) for value in batch.column(name)]


def answer_texts(value: Any) -> list[str]:
    """The texts of one answer, of a list of them, or of a list of structs with `answer` (VQAv2). Nulls are left out."""
    items = value if isinstance(value, list | tuple) else [value]
    answers = (item.get("answer", item) if isinstance(item, Mapping) else item for item in items)
    return [str(answer) for answer in answers if answer is not None]
