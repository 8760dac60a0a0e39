"""CSV manifests: dialects, and rows that can't be read."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.manifest.files import CsvDialect, Manifest
from pipeline.schema import MANIFEST_ERROR
from tests.unit.manifest.manifests import (
    rows_of,
    write,
)


def test_csv_values_are_text_as_written_and_empty_is_null(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    found = load(write(tmp_path / "m.csv", 'id,prompt,fps\n007,"a, ""b""\nc",1.50\n2,,\n'))
    assert found.schema == pa.schema([(name, pa.string()) for name in ("id", "prompt", "fps")])
    assert rows_of(found) == [
        {"id": "007", "prompt": 'a, "b"\nc', "fps": "1.50", MANIFEST_ERROR: None},
        {"id": "2", "prompt": None, "fps": None, MANIFEST_ERROR: None},
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.tsv", "id\timage\n1\ta,b.jpg\n"),
        ("m.csv", "id;image\n1;a,b.jpg\n"),
        ("m.csv", '\ufeffid,image\r\n1,"a,b.jpg"\r\n'),
        ("m.csv", 'id,image\n\n1,"a,b.jpg"'),
    ],
)
def test_the_usual_dialects_are_understood(
    name: str, content: str, tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    assert rows_of(load(write(tmp_path / name, content))) == [{"id": "1", "image": "a,b.jpg", MANIFEST_ERROR: None}]


def test_gzipped_csv_is_read(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    content = "id,image\n" + "".join(f'{i},"a\n{i}"\n' for i in range(500))
    found = load(write(tmp_path / "m.csv.gz", gzip.compress(content.encode())))
    assert [row["image"] for row in rows_of(found, rows_per_unit=33)] == [f"a\n{i}" for i in range(500)]


def test_a_csv_row_with_the_wrong_number_of_fields_is_a_row_with_a_reason(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    content = b'id,image\n1,a.jpg\n2,a,b.jpg\n3\n4,"x"y\n5,\xff\n6,b.jpg\n7,"open'
    read = rows_of(load(write(tmp_path / "m.csv", content)), rows_per_unit=1)
    assert [row["id"] for row in read] == ["1", None, None, None, None, "6", None]
    reasons = [row[MANIFEST_ERROR] for row in read]
    assert reasons[0] is None and reasons[5] is None
    assert "line 3 has 3 fields but the header names 2" in reasons[1]
    assert "line 4 has 1 fields but the header names 2" in reasons[2]
    assert "line 5 is not CSV" in reasons[3] and "line 6 is not UTF-8" in reasons[4]
    assert "a quote that opens in line 8 is never closed: 1 lines" in reasons[6]


@pytest.mark.parametrize("rows_per_unit", [1, 100, 1000])
def test_an_unclosed_quote_is_one_row_that_says_where_it_is_and_what_it_takes(
    rows_per_unit: int, tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    lines = ["id,image", *(f'{number},"a\n.jpg"' for number in range(300)), '300,"b.jpg', *["301,c.jpg"] * 49]
    read = rows_of(load(write(tmp_path / "m.csv", "\n".join(lines))), rows_per_unit=rows_per_unit)
    assert len(read) == 301 and read[299]["id"] == "299"
    assert "a quote that opens in line 602 is never closed: 50 lines, all to the end" in read[300][MANIFEST_ERROR]
    lines[-1:] = ['301,"c.jpg"', "302,d.jpg"]  # a later row's quote closes it
    read = rows_of(load(write(tmp_path / "m.csv", "\n".join(lines))), rows_per_unit=rows_per_unit)
    assert "the row in lines 602 to 651 is not CSV" in read[300][MANIFEST_ERROR]
    assert read[301] == {"id": "302", "image": "d.jpg", MANIFEST_ERROR: None}


@pytest.mark.parametrize(
    ("content", "dialect", "expected"),
    [
        ("sep=;\nid;prompt\n1;a,b\n", CsvDialect(), "a,b"),
        ('"sep=|"\r\nid|prompt\r\n1|a,b\r\n', CsvDialect(), "a,b"),
        ("sep=;\nid,prompt\n1,a;b\n", CsvDialect(delimiter=","), "a;b"),
        ("id,a,b,c~prompt\n1~x\n", CsvDialect(delimiter="~"), "x"),
        ('id,prompt\n1,"say \\"hi\\" now"\n', CsvDialect(escape="\\"), 'say "hi" now'),
        ("id,prompt\n1,'a, ''b'''\n", CsvDialect(quote="'"), "a, 'b'"),
        ('id\tprompt\n1\t"a" 5" disk\n', CsvDialect(quote=""), '"a" 5" disk'),
    ],
)
def test_a_dialect_is_named_by_the_file_or_the_config(
    content: str, dialect: CsvDialect, expected: str, tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    row = rows_of(load(write(tmp_path / "m.csv", content), csv=dialect))[0]
    assert list(row.values()) == ["1", expected, None]


def test_a_column_without_a_name_gets_one(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    assert load(write(tmp_path / "m.csv", ",image\n0,a.jpg\n")).schema.names == ["column_0", "image"]
    found = load(write(tmp_path / "m.csv", b"id,\xed\xa0\x80\n0,1\n"))
    assert rows_of(found)[0]["?"] == "1", "a name that is half of a character"


def test_a_field_may_be_as_long_as_a_data_url(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    url = "data:image/png;base64," + "A" * 1_000_000
    assert rows_of(load(write(tmp_path / "m.csv", f'id,image\n1,"{url}"\n')))[0]["image"] == url
