"""Columns of result rows, and values of published datasets, as texts."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.preprocess.messages.values import as_text, from_json, plain, readable
from pipeline.schema import Status


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
    return pa.array([None if value is None else plain_text(value) for value in values], pa.string())


def answered_texts(batch: pa.RecordBatch) -> list[str | None]:
    """Each row's answer; None if the row failed."""
    answered = pc.equal(batch.column("status"), Status.OK.value).to_pylist()
    return [text or "" if ok else None for text, ok in zip(batch.column("text").to_pylist(), answered, strict=True)]


def reference_lists(batch: pa.RecordBatch, name: str) -> list[list[str]]:
    """Each row's right answers as texts; empty if the row has none."""
    return [answer_texts(readable(value, f"the column {name}")) for value in batch.column(name)]


def option_lists(batch: pa.RecordBatch, name: str) -> list[list[str]]:
    """Each row's options as texts."""
    return [option_texts(readable(value, f"the column {name}")) for value in batch.column(name)]


def answer_texts(value: Any) -> list[str]:
    """The texts of one answer, of a list of them, or of a list of structs with `answer` (VQAv2).

    A text that is a list with texts or structs, in JSON or in Python, counts as that list; a list of numbers in text
    is one answer (a box). Nulls are left out, and answers that are all empty are none.
    """
    items = as_list(value)
    are_answers = [isinstance(item, str | bytes | Mapping) for item in items if item is not None]
    if isinstance(value, str | bytes) and are_answers and not any(are_answers):
        items = [value]
    answers = (plain(item.get("answer", item) if isinstance(item, Mapping) else item) for item in items)
    texts = [plain_text(answer) for answer in answers if answer is not None]
    return texts if any(text.strip() for text in texts) else []


def option_texts(value: Any) -> list[str]:
    """The options' texts. A missing one is empty, so that the others keep their letters; missing ones at the end go."""
    texts = list(map(plain_text, as_list(value)))
    while texts and not texts[-1].strip():
        texts.pop()
    return texts


def as_list(value: Any) -> list[Any]:
    """A list, or the list that a text holds in JSON or in Python (MMMU); another value alone; nothing for a null."""
    value = _decoded(plain(value))
    if value is None:
        return []
    if not isinstance(value, str) or not value.strip().startswith("["):
        return value if isinstance(value, list) else [value]
    for read in (from_json, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list):
            return found
    return [value]


def plain_text(value: Any) -> str:
    """A value as text, empty for null; a whole number has no point."""
    value = _decoded(plain(value))
    text = as_text(value)
    return "" if value is None else str(value) if text is None else text


def _decoded(value: Any) -> Any:
    """The text in bytes, as old writers spell strings; any other value as it is."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value
