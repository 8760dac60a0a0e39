"""Manifests in CSV and TSV: a header line, then rows that may go over several lines where fields are quoted."""

from __future__ import annotations

import csv
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest.files import CsvDialect, refuse_repeated_names
from pipeline.manifest.text import Lines, Record, TextFormat, storable_name

_MAX_FIELD_CHARS = 256 << 20  # a data: URL is one long field
_EXCEL_DELIMITER = re.compile(r'"?sep=(.)"?\s*')
"""The line before the header by which Excel names its delimiter."""


class CsvFormat(TextFormat):
    name = "csv"
    suffixes = (".csv", ".tsv", ".csv.gz", ".tsv.gz")

    def header(self, path: str, file: BinaryIO, dialect: CsvDialect) -> Sequence[str]:
        return _read_header(path, Lines(file), dialect)[0]

    def records(self, path: str, file: BinaryIO, dialect: CsvDialect, start: tuple[int, int]) -> Iterator[Record]:
        lines = Lines(file)
        names, form = _read_header(path, lines, dialect)
        if start[0]:
            lines = Lines(file, *start)
        reader = csv.reader(lines, **form)
        while True:
            begin, line, lines.error = lines.offset, lines.number, None
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Record(begin, line, None, _unreadable(error, line, lines.number - line))
                continue
            if lines.error:
                yield Record(begin, line, None, lines.error)
            elif len(fields) == len(names):
                yield Record(begin, line, {name: text or None for name, text in zip(names, fields, strict=True)})
            elif fields:  # not an empty line
                reason = (
                    f"{_shown(line, lines.number - line)} has {len(fields)} fields but the header names {len(names)}"
                )
                yield Record(begin, line, None, f"{reason}; fields with delimiters or line breaks need quotes")


def _unreadable(error: csv.Error, line: int, count: int) -> str:
    if "unexpected end" in str(error):
        return (
            f"a quote that opens in line {line} is never closed: {count:,} lines, all to the end of the file, are this "
            "one row; close it, or set input.csv.quote or input.csv.escape"
        )
    return f"{_shown(line, count)} is not CSV: {error}; see input.csv.quote and input.csv.escape"


def _shown(line: int, count: int) -> str:
    return f"line {line}" if count == 1 else f"the row in lines {line} to {line + count - 1}"


def _read_header(path: str, lines: Lines, dialect: CsvDialect) -> tuple[Sequence[str], dict[str, Any]]:
    """Column names, and how the rows are written; the lines are left at the first row."""
    csv.field_size_limit(min(_MAX_FIELD_CHARS, sys.maxsize))
    form: dict[str, Any] = {"strict": True, "escapechar": dialect.escape, "doublequote": dialect.escape is None}
    form |= {"quotechar": dialect.quote} if dialect.quote else {"quoting": csv.QUOTE_NONE}
    first, delimiter = next(lines, None), dialect.delimiter
    if first is not None and (named := _EXCEL_DELIMITER.fullmatch(first)):
        first, delimiter = next(lines, None), delimiter or named[1]
    if first is None:
        return (), form
    if delimiter is None:
        delimiter = "\t" if ".tsv" in storage.name(path).lower() else max(",;\t|", key=first.count)
    form["delimiter"] = delimiter
    try:
        fields = next(csv.reader(itertools.chain([first], lines), **form))
    except csv.Error as error:
        raise ManifestError(f"the first line of {path} is not a CSV header: {error}") from error
    names = [storable_name(field).strip() or f"column_{number}" for number, field in enumerate(fields)]
    refuse_repeated_names(names, path)
    return names, form
