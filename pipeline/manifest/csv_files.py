"""Manifests in CSV and TSV: a header line, then rows that may go over several lines where fields are quoted."""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest.files import refuse_repeated_names
from pipeline.manifest.text import Lines, Record, TextFormat

_MAX_FIELD_CHARS = 256 << 20  # a data: URL is one long field


class CsvFormat(TextFormat):
    name = "csv"
    suffixes = (".csv", ".tsv", ".csv.gz", ".tsv.gz")

    def header(self, path: str, file: BinaryIO) -> Sequence[str]:
        return _read_header(path, Lines(file))[0]

    def records(self, path: str, file: BinaryIO, start: int) -> Iterator[Record]:
        lines = Lines(file)
        names, delimiter = _read_header(path, lines)
        if start:
            lines = Lines(file, start)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            begin, lines.error = lines.offset, None
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Record(begin, None, f"the line is not CSV: {error}")
                continue
            if lines.error:
                yield Record(begin, None, lines.error)
            elif len(fields) == len(names):
                yield Record(begin, {name: text or None for name, text in zip(names, fields, strict=True)})
            elif fields:  # not an empty line
                reason = f"the row has {len(fields)} fields but the header names {len(names)}"
                yield Record(begin, None, f"{reason}; fields with commas or line breaks need quotes")


def _read_header(path: str, lines: Lines) -> tuple[Sequence[str], str]:
    """Column names and delimiter; the lines are left at the first row."""
    csv.field_size_limit(min(_MAX_FIELD_CHARS, sys.maxsize))
    first = next(lines, None)
    if first is None:
        return (), ","
    delimiter = "\t" if ".tsv" in storage.name(path).lower() else max(",;\t|", key=first.count)
    try:
        fields = next(csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ManifestError(f"the first line of {path} is not a CSV header: {error}") from error
    names = [field.strip() or f"column_{number}" for number, field in enumerate(fields)]
    refuse_repeated_names(names, path)
    return names, delimiter
