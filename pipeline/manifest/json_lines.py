"""Manifests in JSONL: a JSON object on each line; empty lines are passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from pipeline.errors import first_line
from pipeline.manifest.text import Lines, Record, TextFormat

_EXCERPT_CHARS = 60


class JsonLinesFormat(TextFormat):
    name = "jsonl"
    suffixes = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")

    def records(self, path: str, file: BinaryIO, start: int) -> Iterator[Record]:
        lines = Lines(file, start)
        begin = start
        for line in lines:
            if line.strip():
                yield _record(begin, line, lines.error)
            begin, lines.error = lines.offset, None


def _record(offset: int, line: str, error: str | None) -> Record:
    if error is not None:
        return Record(offset, None, error)
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as fault:
        return Record(offset, None, f"the line is not JSON: {first_line(fault)}; found {_excerpt(line)}")
    if not isinstance(values, dict):
        found = f"a JSON {type(values).__name__}; expected an object: found {_excerpt(line)}"
        return Record(offset, None, f"the line is {found}")
    return Record(offset, values)


def _excerpt(line: str) -> str:
    text = line.strip()
    return repr(text if len(text) <= _EXCERPT_CHARS else text[: _EXCERPT_CHARS - 3] + "...")
