"""JSONL manifests: column types, and lines that can't be read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import ManifestError
from pipeline.manifest.files import Manifest
from pipeline.schema import MANIFEST_ERROR
from tests.unit.manifest.manifests import (
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
    assert reasons[1].startswith("the line is not JSON: ") and reasons[1].endswith("""found '{"id": 2'""")
    assert "JSON list; expected an object" in reasons[2]
    assert "not UTF-8" in reasons[3]
    assert "not JSON" in reasons[4] and len(reasons[4]) < 300


def test_jsonl_files_of_a_folder_share_one_schema(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    write_jsonl(tmp_path / "d" / "1.jsonl", [{"a": 1}] * 3)
    write_jsonl(tmp_path / "d" / "2.ndjson", [{"a": 1.5, "b": "x"}])
    write(tmp_path / "d" / "3.jsonl.gz", gzip.compress(b'{"a": 7}\n' * 300))
    found = load(tmp_path / "d")
    assert found.schema == pa.schema([("a", pa.float64()), ("b", pa.string())])
    assert [file.num_rows for file in found.files] == [3, 1, 300]
    assert [row["a"] for row in rows_of(found, rows_per_unit=130)] == [1.0] * 3 + [1.5] + [7.0] * 300


def test_large_whole_numbers_among_fractions_become_fractions(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    found = load(write_jsonl(tmp_path / "m.jsonl", [{"t": 0.5}, {"t": 2**60 + 1}, {"t": None}]))
    assert [row["t"] for row in rows_of(found)] == [0.5, 2.0**60, None]


def test_a_file_that_was_changed_since_the_plan_is_noticed(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [{"n": number} for number in range(9)])
    found = load(path)
    for rows, reason in ((3, "has 3 rows now but had at least 9"), (9, r"column n of .* held int64 .* does not now")):
        write_jsonl(path, [{"n": "x"}] * rows)
        with pytest.raises(ManifestError, match=reason):
            rows_of(found)


def test_lone_surrogates_in_json_do_not_end_the_job(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    assert rows_of(load(write(tmp_path / "m.jsonl", '{"prompt": "a\\ud800b"}\n')))[0]["prompt"] == "a?b"
