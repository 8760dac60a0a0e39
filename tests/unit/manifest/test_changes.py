"""Manifests compared with those of earlier runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.manifest.changes import difference, keep_file_numbers, only_appended
from pipeline.manifest.files import Manifest
from tests.unit.manifest.manifests import (
    names_of,
    rows_of,
    write_jsonl,
    write_parquet,
)


def test_the_fingerprint_survives_json_copying_and_touching(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    write_parquet(tmp_path / "a" / "x" / "1.parquet", {"id": [1]})
    (tmp_path / "b" / "x").mkdir(parents=True)
    (tmp_path / "b" / "x" / "1.parquet").write_bytes((tmp_path / "a" / "x" / "1.parquet").read_bytes())
    first, copied = load(tmp_path / "a").fingerprint(), load(tmp_path / "b").fingerprint()
    assert json.loads(json.dumps(first)) == copied and first["files"][0][0] == "x/1.parquet"
    assert difference(first, copied) == []


def test_the_difference_says_what_changed_in_each_file() -> None:
    old: dict[str, Any] = {
        "format": "parquet",
        "num_rows": 30,
        "files": [["a", 5, 10], ["b", 5, 10], ["c", 5, 10], ["e", 5, 1]],
    }
    new = {"format": "parquet", "num_rows": 1240, "files": [["b", 9, 1234], ["c", 6, 10], ["d", 5, 3], ["e", 5, 1]]}
    assert difference(old, new) == [
        "a is gone (10 rows)",
        "b had 10 rows and has 1,234",
        "c had 5 bytes and has 6, with as many rows",
        "d is new (3 rows)",
    ]
    assert not only_appended(old, new)
    assert difference(old, old | {"format": "csv"}) == ["the manifest's format was parquet and is csv"]
    assert difference(old, old | {"files": old["files"][::-1]}) == []
    many = {"format": "csv", "num_rows": 0, "files": [[str(number), 1, 1] for number in range(1000)]}
    assert len(difference(many, many | {"files": []})) == 21


def test_new_files_are_numbered_behind_the_old_ones(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    folder = tmp_path / "d"
    for name in ("b", "d"):
        write_jsonl(folder / f"{name}.jsonl", [{"id": name}])
    old = load(folder).fingerprint()
    for name in ("a", "c"):
        write_jsonl(folder / f"{name}.jsonl", [{"id": name}] * 2)
    found = load(folder)
    assert only_appended(old, found.fingerprint())
    kept = keep_file_numbers(found, old)
    assert names_of(kept) == ["b.jsonl", "d.jsonl", "a.jsonl", "c.jsonl"]
    again = load(folder)  # the job's next run, when the record has the files in the order of the first
    assert difference(kept.fingerprint(), again.fingerprint()) == []
    assert names_of(keep_file_numbers(again, kept.fingerprint())) == names_of(kept)
    assert [row["id"] for row in rows_of(kept, rows_per_unit=1)] == ["b", "d", "a", "a", "c", "c"]
