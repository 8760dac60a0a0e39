"""JSONL manifests: column types, and lines that can't be read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import ManifestError
from pipeline.manifest.files import Manifest
from pipeline.schema import MANIFEST_ERROR
from tests.unit.manifest.manifests import (
    read_unit,
    rows_of,
    write,
    write_jsonl,
)


def test_jsonl_scalars_and_flat_lists_keep_their_types(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    rows: list[dict[str, Any]] = [
        {"i": 1, "f": 1, "b": True, "s": "x", "l": ["a"], "li": [1, 2], "null": None},
        {"i": None, "f": 1.5, "b": None, "s": None, "l": [], "li": None},
        {"new": "late"},
    ]
    found = load(write_jsonl(tmp_path / "m.jsonl", rows))
    assert found.schema == pa.schema(
        [
            ("i", pa.int64()), ("f", pa.float64()), ("b", pa.bool_()), ("s", pa.string()),
            ("l", pa.list_(pa.string())), ("li", pa.list_(pa.int64())), ("null", pa.string()), ("new", pa.string()),
        ]
    )  # fmt: skip
    names = [*found.schema.names, MANIFEST_ERROR]
    assert rows_of(found) == [dict.fromkeys(names) | row for row in rows]


def test_mixed_and_nested_jsonl_values_become_json_strings(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    plain = [{"role": "user", "content": "hi"}]
    parts = [{"role": "user", "content": [{"type": "image"}, "what?"]}]
    rows = [
        {"messages": plain, "mixed": "text", "image": ["a.jpg", "b.jpg"], "big": 2**70},
        {"messages": parts, "mixed": 5, "image": "c.jpg", "big": 1},
        {"messages": json.dumps(plain), "mixed": [1, "x"], "image": None, "big": None},
    ]
    found = load(write_jsonl(tmp_path / "m.jsonl", rows))
    assert set(found.schema.types) == {pa.string()}
    read = rows_of(found, rows_per_unit=1)
    assert [json.loads(row["messages"]) for row in read] == [plain, parts, plain]
    assert [row["mixed"] for row in read] == ["text", "5", '[1, "x"]']
    assert [row["image"] for row in read] == ['["a.jpg", "b.jpg"]', "c.jpg", None]
    assert [row["big"] for row in read] == [str(2**70), "1", None]


def test_messages_are_json_strings_even_when_all_are_strings(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    found = load(write_jsonl(tmp_path / "m.jsonl", [{"messages": ["hi"]}]))
    assert rows_of(found)[0]["messages"] == '["hi"]'


def test_a_bad_line_is_a_row_with_a_reason(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    content = b'\xef\xbb\xbf{"id": 1}\n\n{"id": 2\n[3]\n{"id": "\xff"}\n   \n' + b"[" * 100_000 + b'\n{"id": 5}'
    read = rows_of(load(write(tmp_path / "m.jsonl", content)), rows_per_unit=1)
    assert [row["id"] for row in read] == [1, None, None, None, None, 5]
    reasons = [row[MANIFEST_ERROR] for row in read]
    assert reasons[0] is None and reasons[5] is None
    assert reasons[1] == """line 3 is not JSON: Expecting ',' delimiter at column 9; found '{"id": 2'"""
    assert "JSON list; expected an object" in reasons[2]
    assert "line 5 is not UTF-8" in reasons[3]
    assert "not JSON" in reasons[4] and len(reasons[4]) < 300


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{\n "id": 1,\n "a": {}\n}\n{\n "id": 2\n}\n', r"is JSON over several lines; .*jq -c \. FILE.*found '\{'"),
        ('[\n{"id": 1},\n{"id": 2},\n{"id": 3}\n]', r"is a JSON array; .*jq -c '\.\[\]' FILE.*line 1 .*found '\['"),
        ('[{"id": 1}, {"id": 2}]', r"is a JSON array.*expected an object: found '\[\{"),
        ("id,image\n1,a.jpg\n", r"no line of .*m\.jsonl is a row: line 1 is not JSON.*found 'id,image'"),
        ('{"id": 1}\r{"id": 2}\r', r"the lines of .*m\.jsonl end in carriage returns alone"),
        (b"PK\x03\x04xlsx", r"is a ZIP archive, as Excel's workbooks are"),
        (b"\x28\xb5\x2f\xfd\x04\x00", r"m\.jsonl is compressed by Zstandard"),
        # Without the time: the bytes name the test, and workers that collect in different seconds would differ.
        (gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), r"m\.jsonl is gzipped twice"),
        ('{"id": 1}\n'.encode("utf-16-le"), r"m\.jsonl is UTF-16"),
        ("version https://git-lfs.github.com/spec/v1\noid\n", r"m\.jsonl is a Git LFS pointer"),
    ],
)
def test_a_file_of_another_form_says_so_and_shows_its_first_line(
    content: str | bytes, reason: str, tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    with pytest.raises(ManifestError, match=reason):
        load(write(tmp_path / "m.jsonl", content))


def test_of_several_files_the_one_that_can_not_be_read_is_named(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    write(tmp_path / "d" / "1.jsonl", '[1]\n{"id": 1}\n')
    write(tmp_path / "d" / "2.jsonl", "<html>\n<html>\n")
    write(tmp_path / "d" / "3.jsonl", "")
    found = load(tmp_path / "d")
    assert [row["id"] for row in rows_of(found)] == [None, 1, None, None]
    (note,) = found.notes
    assert "2.jsonl is a row: line 1 is not JSON" in note and "<html>" in note


def test_gzip_is_known_by_its_first_bytes(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    path = write(tmp_path / "m.jsonl", gzip.compress(b"".join(b'{"id": %d}\n' % number for number in range(500))))
    assert [row["id"] for row in rows_of(load(path), rows_per_unit=130)] == list(range(500))


def test_jsonl_files_of_a_folder_share_one_schema(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    write_jsonl(tmp_path / "d" / "1.jsonl", [{"a": 1}] * 3)
    write_jsonl(tmp_path / "d" / "2.ndjson", [{"a": 1.5, "b": "x"}])
    write(tmp_path / "d" / "3.jsonl.gz", gzip.compress(b'{"a": 7}\n' * 300))
    found = load(tmp_path / "d")
    assert found.schema == pa.schema([("a", pa.float64()), ("b", pa.string())])
    assert [file.num_rows for file in found.files] == [3, 1, 300]
    assert [row["a"] for row in rows_of(found, rows_per_unit=130)] == [1.0] * 3 + [1.5] + [7.0] * 300


def test_numbers_keep_their_values_where_floats_can_not_hold_all_of_them(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    rows = [
        {"t": 0.5, "l": [0.5], "exact": 2**53, "whole": 2**60 + 1, "wholes": [1, 2**60 + 1]},
        {"t": 2**60 + 1, "l": [1, 2**53 + 1], "exact": 0.5, "whole": 1, "wholes": [2]},
        {"t": None, "l": None, "exact": None, "whole": None, "wholes": None},
    ]
    found = load(write_jsonl(tmp_path / "m.jsonl", rows))
    assert found.schema.types == [pa.string(), pa.string(), pa.float64(), pa.int64(), pa.list_(pa.int64())]
    read = rows_of(found)
    assert [row["t"] for row in read] == ["0.5", str(2**60 + 1), None]
    assert [row["l"] for row in read] == ["[0.5]", f"[1, {2**53 + 1}]", None]
    for name in ("exact", "whole", "wholes"):
        assert [row[name] for row in read] == [row[name] for row in rows]


def test_a_change_is_noticed_by_the_rows_where_the_file_s_size_and_version_are_unknown(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [{"n": number} for number in range(9)])
    found = load(path)
    unit = replace(found.unit(0, 0, 9), size=None, version=None)
    for rows, reason in ((3, "has 3 rows now but had at least 9"), (9, r"column n of .* held int64 .* does not now")):
        write_jsonl(path, [{"n": "x"}] * rows)
        with pytest.raises(ManifestError, match=reason):
            read_unit(found.spec, unit)


def test_lone_surrogates_in_json_do_not_end_the_job(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    lines = [
        '{"prompt": "a", "images": ["a.png"], "extra": {"é": 1}}',
        '{"prompt": "a\\ud800b", "images": ["b.png"]}',
        '{"prompt": "c", "images": ["c.png", "\\ud83d"], "extra": {"k": "\\ud83dé"}}',
        '{"prompt": "\\ud83d\\ude00", "images": null}',
    ]
    found = load(write(tmp_path / "m.jsonl", "\n".join(lines)))
    fine, prompt, images, whole = rows_of(found)
    assert fine == {"prompt": "a", "images": ["a.png"], "extra": '{"é": 1}', MANIFEST_ERROR: None}
    assert prompt["prompt"] is None and prompt["images"] == ["b.png"]
    assert prompt[MANIFEST_ERROR] == (
        "line 2: the column prompt holds '\\ud800', half of a character; write the whole character"
    )
    assert images["images"] is None and "line 3: the column images holds '\\ud83d'" in images[MANIFEST_ERROR]
    assert json.loads(images["extra"]) == {"k": "\ud83dé"} and images["prompt"] == "c"
    assert whole["prompt"] == "😀" and whole[MANIFEST_ERROR] is None
    assert {row[MANIFEST_ERROR] for row in rows_of(found, columns=["extra"])} == {None}
    found = load(write(tmp_path / "m.jsonl", b'{"id": 1, "\\ud800": 2}\n{"id": 3, "\xed\xa0\x80": 4, "\xc3\xa9": 5}\n'))
    assert [(row["id"], row["?"], row["é"]) for row in rows_of(found)] == [(1, 2, None), (3, 4, 5)]
