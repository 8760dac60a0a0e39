"""CSV manifests: dialects, and rows that can't be read."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.manifest.files import Manifest
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
    assert "has 3 fields but the header names 2" in reasons[1]
    assert "has 1 fields but the header names 2" in reasons[2]
    assert "not CSV" in reasons[3] and "not UTF-8" in reasons[4] and "not CSV" in reasons[6]


def test_a_column_without_a_name_gets_one(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    assert load(write(tmp_path / "m.csv", ",image\n0,a.jpg\n")).schema.names == ["column_0", "image"]


def test_a_field_may_be_as_long_as_a_data_url(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    url = "data:image/png;base64," + "A" * 1_000_000
    assert rows_of(load(write(tmp_path / "m.csv", f'id,image\n1,"{url}"\n')))[0]["image"] == url
