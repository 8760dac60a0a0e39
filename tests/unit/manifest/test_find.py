"""From a path to a manifest: what is found, chosen or refused."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ManifestError
from pipeline.manifest.files import Manifest
from pipeline.manifest.find import open_manifest, recorded_manifest
from pipeline.schema import READER_COLUMNS
from tests.unit.manifest.manifests import (
    cut,
    rows_of,
    write,
    write_jsonl,
    write_parquet,
)


def test_a_parquet_file_is_a_manifest(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    path = write_parquet(tmp_path / "data" / "m.parquet", {"image": ["a.jpg", "b.jpg"], "n": [1, 2]})
    found = load(path)
    assert (found.format, found.num_rows, found.base) == ("parquet", 2, str(tmp_path / "data"))
    assert found.schema == pa.schema([("image", pa.string()), ("n", pa.int64())])
    (file,) = found.files
    assert (file.path, file.num_rows, file.size) == (str(path), 2, path.stat().st_size)
    assert rows_of(found) == [{"image": "a.jpg", "n": 1}, {"image": "b.jpg", "n": 2}]


def test_a_folder_or_glob_of_parquet_is_read_in_the_order_of_names(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    folder = tmp_path / "data"
    for name, value in (("b", 2), ("a", 1), ("c/d", 3), (".hidden", 8), ("_metadata", 9)):
        write_parquet(folder / f"{name}.parquet", {"id": [value]})
    write(folder / "_SUCCESS", "")
    write(folder / "README.md", "hello")
    assert [row["id"] for row in rows_of(load(folder))] == [1, 2, 3]
    assert [row["id"] for row in rows_of(load(f"{folder}/"))] == [1, 2, 3]
    assert [row["id"] for row in rows_of(load(folder / "*.parquet"))] == [1, 2]
    assert load(folder / "*.parquet").base == str(folder)
    assert [row["id"] for row in rows_of(load(folder / "**" / "*.parquet"))] == [1, 2, 3]


def test_brackets_in_a_file_name_are_no_wildcards(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    assert load(write_parquet(tmp_path / "m[1].parquet", {"id": [1]})).num_rows == 1


def test_relative_paths_are_made_absolute_for_readers_elsewhere(
    tmp_path: Path, load: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "data" / "m.parquet", {"id": [1]})
    monkeypatch.chdir(tmp_path)
    found = load("data")
    assert found.files[0].path == str(tmp_path / "data" / "m.parquet") and found.base == str(tmp_path / "data")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda root: root / "nowhere.parquet", "no file or folder at .*nowhere.parquet"),
        (lambda root: root / "*.parquet", r"no file matches .*\*\.parquet"),
        (lambda root: write(root / "notes.txt", "x"), r"found 1 files \(notes.txt\); expected .parquet.*input.format"),
        (lambda root: write(root / "d" / "notes.txt", "x").parent, r"found 1 files \(notes.txt\); expected .parquet"),
        (lambda root: write(root / "d" / ".hidden.parquet", "x").parent, "found no files"),
        (lambda root: write(root / "m.parquet", b"PAR1 cut off"), "is not a whole Parquet file"),
        (lambda root: write(root / "empty.parquet", b""), "is not a whole Parquet file"),
        (lambda root: write(root / "m.csv", "a,b\n1,2\n".encode("utf-16")), "is UTF-16; save it as UTF-8"),
        (lambda root: write(root / "m.csv", "a,b,a\n1,2,3\n"), "several columns of the same name: a"),
        (lambda root: write(root / "m.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9000)[:-20]), "not a whole gzip"),
        (lambda root: write(root / "m.jsonl.gz", b"not gzip"), "not a whole gzip"),
        (lambda root: write(root / "m.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 90), "not a whole gzip"),
    ],
)
def test_nothing_usable_says_what_was_found_and_what_is_accepted(
    make: Callable[[Path], Path], reason: str, tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    with pytest.raises(ManifestError, match=reason) as caught:
        load(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_empty_path_is_refused(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    with pytest.raises(ManifestError, match=r"input\.path is empty"):
        load("")


def test_two_kinds_of_data_files_are_refused_and_the_format_settles_it(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    folder = write_parquet(tmp_path / "d" / "m.parquet", {"id": [1]}).parent
    write(folder / "labels.csv", "id\n5\n6\n")
    with pytest.raises(ManifestError, match=r"several formats: 1 parquet .*m.parquet.*1 csv .*labels.csv"):
        load(folder)
    assert load(folder, format="csv").num_rows == 2
    assert load(folder, format="parquet").num_rows == 1


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_folders_named_as_hive_does_give_columns(format: str, tmp_path: Path, load: Callable[..., Manifest]) -> None:
    for number, folder in enumerate(("year=2024/month=01", "year=2025/month=a%2Fb", "year=__HIVE_DEFAULT_PARTITION__")):
        path = tmp_path / "d" / "base=no" / folder / f"m.{format}"
        write_parquet(path, {"id": [f"{number}"]}) if format == "parquet" else write(path, f"id\n{number}\n")
    for path in (tmp_path / "d" / "base=no", tmp_path / "d" / "base=no" / "year=*" / "**" / f"*.{format}"):
        found = load(path)
        assert found.schema == pa.schema([("id", pa.string()), ("year", pa.int64()), ("month", pa.string())])
        assert [(row["id"], row["year"], row["month"]) for row in rows_of(found)] == [
            ("0", 2024, "01"), ("1", 2025, "a/b"), ("2", None, None),
        ]  # fmt: skip
        assert [row["year"] for row in rows_of(found, columns=["year"], rows_per_unit=1)] == [2024, 2025, None]


def test_a_column_in_the_files_wins_over_their_folder(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    write_parquet(tmp_path / "d" / "year=2024" / "m.parquet", {"year": ["24"]})
    assert rows_of(load(tmp_path / "d")) == [{"year": "24"}]


@pytest.mark.parametrize("name", sorted(READER_COLUMNS))
def test_a_column_with_a_name_of_the_reader_s_own_is_refused(
    name: str, tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    rows = [{"prompt": "a", "more": 1}, {"prompt": "b", name: 7}]
    paths = [
        write_parquet(tmp_path / "m.parquet", {"prompt": ["a"], name: [7]}),
        write_jsonl(tmp_path / "m.jsonl", rows),
        write(tmp_path / "m.csv", f"prompt,{name}\na,7\n"),
        write_parquet(tmp_path / "d" / f"{name}=7" / "m.parquet", {"prompt": ["a"]}).parent.parent,
    ]
    for path in paths:
        with pytest.raises(
            ManifestError, match=rf"{path} has columns with names that the job reserves for itself: {name}; rename them"
        ):
            load(path)


def test_the_format_can_be_forced_on_a_file_of_another_name(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    assert load(write(tmp_path / "m.data", '{"id": 1}\n'), format="jsonl").format == "jsonl"


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])
def test_an_empty_manifest_has_no_rows_and_no_units(format: str, tmp_path: Path, load: Callable[..., Manifest]) -> None:
    path = tmp_path / f"m.{format}"
    if format == "parquet":
        write_parquet(path, {"image": pa.array([], pa.string())})
    else:
        write(path, "image\n" if format == "csv" else "")
    found = load(path)
    assert found.num_rows == 0 and cut(found, 5) == []


def test_an_earlier_run_s_counts_are_used_while_the_listing_is_the_same(tmp_path: Path) -> None:
    for name in ("b", "a"):
        pq.write_table(pa.table({"prompt": [name] * 3}), tmp_path / f"{name}.parquet")
    opened = open_manifest(str(tmp_path), listing_path=str(tmp_path / "none"))
    record = {"fingerprint": opened.fingerprint(), "versions": [file.version for file in opened.files]}
    record = json.loads(json.dumps(record))
    times = (tmp_path / "a.parquet").stat()
    (tmp_path / "a.parquet").write_bytes(b"x" * times.st_size)  # no Parquet file: opening it would be an error
    os.utime(tmp_path / "a.parquet", ns=(times.st_atime_ns, times.st_mtime_ns))
    found = recorded_manifest(str(tmp_path), record)
    assert found is not None
    assert found.files == opened.files
    assert found.fingerprint() == opened.fingerprint()
    assert recorded_manifest(str(tmp_path), {**record, "versions": None}) is None
    assert recorded_manifest(str(tmp_path), {"fingerprint": record["fingerprint"]}) is None
    assert recorded_manifest(str(tmp_path), record, format="jsonl") is None
    pq.write_table(pa.table({"prompt": ["c"]}), tmp_path / "c.parquet")
    assert recorded_manifest(str(tmp_path), record) is None
    (tmp_path / "c.parquet").unlink()
    os.utime(tmp_path / "b.parquet")
    assert recorded_manifest(str(tmp_path), record) is None
    assert recorded_manifest(str(tmp_path / "gone"), record) is None
