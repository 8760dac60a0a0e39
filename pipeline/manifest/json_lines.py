"""Manifests in JSONL: a JSON object on each line; empty lines are passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.errors import first_line
from pipeline.manifest.files import CsvDialect
from pipeline.manifest.text import Lines, Record, TextFormat, storable_name

_EXCERPT_CHARS = 60


class JsonLinesFormat(TextFormat):
    name = "jsonl"
    suffixes = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")

    def records(self, path: str, file: BinaryIO, dialect: CsvDialect, start: tuple[int, int]) -> Iterator[Record]:
        lines = Lines(file, *start)
        begin, number = start
        for line in lines:
            if line.strip():
                values, error = (None, lines.error) if lines.error else _parse(line, number)
                yield Record(begin, number, values, error)
            begin, number, lines.error = lines.offset, lines.number, None

    def likely_form(self, first: str) -> str | None:
        opening = first.strip()
        if opening.startswith("["):
            return "a JSON array; write an object a line, as `jq -c '.[]' FILE` does"
        if opening == "{":
            return "JSON over several lines; write an object a line, as `jq -c . FILE` does"
        return None


def _parse(line: str, number: int) -> tuple[dict[str, Any] | None, str | None]:
    """The line's object, or why there is none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as fault:
        reason = first_line(fault)
        if isinstance(fault, json.JSONDecodeError):  # whose own words count lines from this one
            reason = f"{fault.msg} at column {min(fault.pos, len(line.rstrip())) + 1}"
        return None, f"line {number} is not JSON: {reason}; found {_excerpt(line)}"
    if not isinstance(values, dict):
        return None, f"line {number} is a JSON {type(values).__name__}; expected an object: found {_excerpt(line)}"
    if any(not name.isascii() for name in values):
        values = {storable_name(name): value for name, value in values.items()}
    return values, None


def _excerpt(line: str) -> str:
    text = line.strip()
    return repr(text if len(text) <= _EXCERPT_CHARS else text[: _EXCERPT_CHARS - 3] + "...")
