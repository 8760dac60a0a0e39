"""Finding, fingerprinting, planning and reading manifests: small real files of every format."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest import (
    ERROR_COLUMN,
    Manifest,
    WorkUnit,
    difference,
    keep_file_numbers,
    only_appended,
    open_manifest,
    parquet,
    read_unit,
    read_units,
    recorded_manifest,
    unit_of,
)


def cut(found: Manifest, rows_per_unit: int) -> list[WorkUnit]:
    """The whole manifest in units of so many rows."""
    return [
        unit_of(found, number, start, min(start + rows_per_unit, file.num_rows))
        for number, file in enumerate(found.files)
        for start in range(0, file.num_rows, rows_per_unit)
    ]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Manifest]:
    def open_it(path: Path | str, **options: Any) -> Manifest:
        return open_manifest(str(path), listing_path=str(tmp_path / "run" / "listing.parquet"), **options)

    return open_it


def write_parquet(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def rows_of(
    found: Manifest, *, rows_per_unit: int = 1000, columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    spec = pickle.loads(pickle.dumps(found.spec))  # as a reader elsewhere gets it
    units = cut(found, rows_per_unit)
    return [row for unit in units for row in read_unit(spec, unit, columns=columns).to_pylist()]


def names_of(found: Manifest) -> list[str]:
    return [Path(file.path).name for file in found.files]


# ---------------------------------------------------------------------------------------------------------------------
# Finding


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
    ("make", "words"),
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
    ],
)
def test_nothing_usable_says_what_was_found_and_what_is_accepted(
    make: Callable[[Path], Path], words: str, tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        load(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_empty_path_or_unknown_format_is_refused(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    with pytest.raises(ManifestError, match=r"input\.path is empty"):
        load("")
    with pytest.raises(ManifestError, match="'xml'; allowed: auto, parquet, jsonl, csv, media"):
        load(tmp_path, format="xml")


def test_two_kinds_of_data_files_are_refused_and_the_format_settles_it(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    folder = write_parquet(tmp_path / "d" / "m.parquet", {"id": [1]}).parent
    write(folder / "labels.csv", "id\n5\n6\n")
    with pytest.raises(ManifestError, match=r"several formats: 1 parquet .*m.parquet.*1 csv .*labels.csv"):
        load(folder)
    assert load(folder, format="csv").num_rows == 2
    assert load(folder, format="parquet").num_rows == 1


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


# ---------------------------------------------------------------------------------------------------------------------
# Media folders


def make_media(folder: Path) -> Path:
    for name in ("b.JPG", "a/clip.mp4", "a/photo.png", ".thumbs/x.jpg", "a/.hidden.jpg", "notes.txt", "c.webm"):
        write(folder / name, "x")
    return folder


def test_a_folder_of_media_is_listed_sorted_and_recursively(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    found = load(make_media(tmp_path / "photos"))
    assert (found.format, found.base) == ("media", str(tmp_path / "photos"))
    assert rows_of(found) == [
        {"id": "a/clip.mp4", "image": None, "video": "a/clip.mp4"},
        {"id": "a/photo.png", "image": "a/photo.png", "video": None},
        {"id": "b.JPG", "image": "b.JPG", "video": None},
        {"id": "c.webm", "image": None, "video": "c.webm"},
    ]
    assert all((tmp_path / "photos" / row["id"]).exists() for row in rows_of(found))


def test_a_resumed_job_uses_the_listing_of_its_first_run(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    folder = make_media(tmp_path / "photos")
    first = load(folder)
    write(folder / "aa_new.jpg", "x")
    (folder / "b.JPG").unlink()
    again = load(f"{folder}/")
    assert rows_of(again) == rows_of(first) and again.base == first.base
    assert difference(first.fingerprint(), again.fingerprint()) == []


def test_new_media_are_taken_up_behind_the_old_ones_when_asked(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    folder = make_media(tmp_path / "photos")
    first = load(folder, new_media=True)
    write(folder / "aa_new.jpg", "x")
    grown = load(folder, new_media=True)
    assert rows_of(grown)[: first.num_rows] == rows_of(first)
    assert [row["image"] for row in rows_of(grown)[first.num_rows :]] == ["aa_new.jpg"]
    assert only_appended(first.fingerprint(), grown.fingerprint())
    write(folder / "a" / "zz_newer.mp4", "x")
    assert load(folder) == grown, "a run that does not ask sees what was taken up, and no more"
    newest = load(folder, new_media=True)
    assert [row["video"] for row in rows_of(newest)][-1] == "a/zz_newer.mp4" and len(newest.files) == 3
    assert load(folder, new_media=True) == newest


def test_a_listing_of_another_folder_is_not_mistaken_for_this_one(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    load(make_media(tmp_path / "photos"))
    with pytest.raises(ManifestError, match=r"lists the media of .*photos, but input.path is .*others"):
        load(make_media(tmp_path / "others"))
    data = load(write_jsonl(tmp_path / "m.jsonl", [{"prompt": "x"}]))
    assert data.format == "jsonl"


def test_a_glob_of_media_and_a_single_medium_are_fine(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    folder = make_media(tmp_path / "photos")
    listing = str(tmp_path / "one.parquet")
    found = open_manifest(str(folder / "a" / "*.png"), listing_path=listing)
    assert [row["image"] for row in rows_of(found)] == ["photo.png"] and found.base == str(folder / "a")
    found = load(folder / "b.JPG")
    assert [row["image"] for row in rows_of(found)] == ["b.JPG"] and found.base == str(folder)


def test_data_files_beside_media_are_the_manifest_and_deeper_ones_are_not(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    folder = make_media(tmp_path / "photos")
    write(folder / "a" / "exif.csv", "camera\nx\n")
    assert load(folder).format == "media"
    (tmp_path / "run" / "listing.parquet").unlink()
    write_jsonl(folder / "metadata.jsonl", [{"image": "b.JPG", "prompt": "?"}])
    found = load(folder)
    assert (found.format, names_of(found), found.base) == ("jsonl", ["metadata.jsonl"], str(folder))
    assert load(folder, format="media").num_rows == 4


def test_a_bucket_prefix_of_media_is_listed_too(load: Callable[..., Manifest]) -> None:
    root = f"memory://{uuid.uuid4().hex}/photos"
    for name in ("a/b.jpg", "c.mp4", "readme.txt"):
        storage.publish(f"{root}/{name}", b"x")
    found = load(root)
    assert found.base == root
    assert rows_of(found) == [
        {"id": "a/b.jpg", "image": "a/b.jpg", "video": None},
        {"id": "c.mp4", "image": None, "video": "c.mp4"},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Parquet


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_units_cut_across_row_groups_and_files(place: str, tmp_path: Path, load: Callable[..., Manifest]) -> None:
    counts = [10, 0, 7, 25]
    first = 0
    for number, count in enumerate(counts):
        path = write_parquet(
            tmp_path / "d" / f"{number}.parquet",
            {"id": pa.array(range(first, first + count), pa.int64()), "text": pa.array(["x"] * count, pa.string())},
            row_group_size=4,
        )
        first += count
        if place == "bucket":
            storage.publish_file(path, f"memory://{tmp_path.name}/d/{number}.parquet")
    found = load(tmp_path / "d" if place == "disk" else f"memory://{tmp_path.name}/d")
    for rows_per_unit in (1, 3, 4, 6, 100):
        assert [row["id"] for row in rows_of(found, rows_per_unit=rows_per_unit)] == list(range(first))
    assert rows_of(found, columns=["text"])[0] == {"text": "x"}
    assert rows_of(found, columns=["text", "id", "text"])[3] == {"text": "x", "id": 3}


def test_files_with_different_columns_are_unified(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    folder = tmp_path / "d"
    write_parquet(folder / "1.parquet", {"id": pa.array([1], pa.int32()), "image": ["a.jpg"]})
    write_parquet(folder / "2.parquet", {"id": pa.array([2**40], pa.int64()), "fps": [1.5]})
    write_parquet(folder / "3.parquet", {"image": pa.nulls(1), "id": [3], "fps": pa.array([2], pa.int64())})
    write_parquet(folder / "4.parquet", {"image": pa.array(["d"]).dictionary_encode(), "fps": [None], "id": [4]})
    found = load(folder)
    assert found.schema == pa.schema([("id", pa.int64()), ("image", pa.string()), ("fps", pa.float64())])
    assert rows_of(found) == [
        {"id": 1, "image": "a.jpg", "fps": None},
        {"id": 2**40, "image": None, "fps": 1.5},
        {"id": 3, "image": None, "fps": 2.0},
        {"id": 4, "image": "d", "fps": None},
    ]
    tables = [read_unit(found.spec, unit) for unit in cut(found, 1)]
    assert {table.schema for table in tables} == {found.schema}
    assert rows_of(found, columns=["fps"])[0] == {"fps": None}


def test_structs_with_different_fields_are_unified(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    folder = tmp_path / "d"
    write_parquet(folder / "1.parquet", {"messages": [[{"role": "user", "content": [{"type": "text", "text": "x"}]}]]})
    write_parquet(
        folder / "2.parquet", {"messages": [[{"role": "user", "content": [{"type": "image", "image": "a.jpg"}]}]]}
    )
    parts = [row["messages"][0]["content"][0] for row in rows_of(load(folder))]
    assert [{key: value for key, value in part.items() if value} for part in parts] == [
        {"type": "text", "text": "x"},
        {"type": "image", "image": "a.jpg"},
    ]


def test_types_that_do_not_fit_name_file_column_and_both_types(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    write_parquet(tmp_path / "d" / "1.parquet", {"image": ["a.jpg"]})
    write_parquet(tmp_path / "d" / "2.parquet", {"image": [7]})
    with pytest.raises(ManifestError, match=r"column image is int64 in .*2\.parquet but string in the files before it"):
        load(tmp_path / "d")


def test_a_column_that_does_not_exist_is_refused(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    found = load(write_parquet(tmp_path / "m.parquet", {"image": ["a"]}))
    with pytest.raises(ManifestError, match="no column label; its columns: image"):
        read_unit(found.spec, WorkUnit(0, found.files[0].path, 0, 1), columns=["label"])


def test_a_file_that_shrank_or_vanished_since_the_plan_is_noticed(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    path = write_parquet(tmp_path / "m.parquet", {"id": list(range(10))})
    found = load(path)
    (unit,) = cut(found, 100)
    write_parquet(path, {"id": [1]})
    with pytest.raises(ManifestError, match="has 1 rows now but had at least 10"):
        read_unit(found.spec, unit)
    path.unlink()
    with pytest.raises(ManifestError, match="can't read rows 0 to 10"):
        read_unit(found.spec, unit)


def test_large_row_groups_are_streamed(
    tmp_path: Path, load: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_BUFFER_WHOLE_BYTES", 0)
    found = load(write_parquet(tmp_path / "m.parquet", {"id": list(range(5000)), "data": [b"x" * 100] * 5000}))
    assert [row["id"] for row in rows_of(found, rows_per_unit=1700, columns=["id"])] == list(range(5000))


def test_thousands_of_files_open_quickly(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(10)), "image": ["a.jpg"] * 10}), sink)
    (tmp_path / "d").mkdir()
    for number in range(1000):
        (tmp_path / "d" / f"{number:05d}.parquet").write_bytes(sink.getvalue())
    start = time.perf_counter()
    found = load(tmp_path / "d")
    assert found.num_rows == 10_000 and time.perf_counter() - start < 10
    assert len(pickle.dumps(found.spec)) < 2000, "what travels to each reader must not grow with the number of files"


# ---------------------------------------------------------------------------------------------------------------------
# JSONL


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
    names = [*found.schema.names, ERROR_COLUMN]
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
    reasons = [row[ERROR_COLUMN] for row in read]
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


def test_lone_surrogates_in_json_do_not_end_the_job(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    assert rows_of(load(write(tmp_path / "m.jsonl", '{"prompt": "a\\ud800b"}\n')))[0]["prompt"] == "a?b"


# ---------------------------------------------------------------------------------------------------------------------
# CSV


def test_csv_values_are_text_as_written_and_empty_is_null(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    found = load(write(tmp_path / "m.csv", 'id,prompt,fps\n007,"a, ""b""\nc",1.50\n2,,\n'))
    assert found.schema == pa.schema([(name, pa.string()) for name in ("id", "prompt", "fps")])
    assert rows_of(found) == [
        {"id": "007", "prompt": 'a, "b"\nc', "fps": "1.50", ERROR_COLUMN: None},
        {"id": "2", "prompt": None, "fps": None, ERROR_COLUMN: None},
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
    assert rows_of(load(write(tmp_path / name, content))) == [{"id": "1", "image": "a,b.jpg", ERROR_COLUMN: None}]


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
    reasons = [row[ERROR_COLUMN] for row in read]
    assert reasons[0] is None and reasons[5] is None
    assert "has 3 fields but the header names 2" in reasons[1]
    assert "has 1 fields but the header names 2" in reasons[2]
    assert "not CSV" in reasons[3] and "not UTF-8" in reasons[4] and "not CSV" in reasons[6]


def test_a_column_without_a_name_gets_one(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    assert load(write(tmp_path / "m.csv", ",image\n0,a.jpg\n")).schema.names == ["column_0", "image"]


def test_a_field_may_be_as_long_as_a_data_url(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    url = "data:image/png;base64," + "A" * 1_000_000
    assert rows_of(load(write(tmp_path / "m.csv", f'id,image\n1,"{url}"\n')))[0]["image"] == url


# ---------------------------------------------------------------------------------------------------------------------
# Units


@pytest.mark.parametrize("format", ["jsonl", "csv"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6), max_size=300),
    rows_per_unit=st.integers(1, 200),
    data=st.data(),
)
def test_text_units_hold_exactly_their_rows(
    format: str, texts: list[str], rows_per_unit: int, data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / f"m.{format}"
    if format == "jsonl":
        write_jsonl(path, [{"id": str(number), "text": text} for number, text in enumerate(texts)])
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows([["id", "text"], *([str(number), text] for number, text in enumerate(texts))])
    found = open_manifest(str(path), listing_path=str(tmp_path / "listing.parquet"))
    expected = [(str(number), (text or None) if format == "csv" else text) for number, text in enumerate(texts)]
    assert [(row["id"], row["text"]) for row in rows_of(found, rows_per_unit=rows_per_unit)] == expected
    if texts:  # any unit alone, read first
        unit = data.draw(st.sampled_from(cut(found, rows_per_unit)))
        assert read_unit(found.spec, unit, columns=["id"])["id"].to_pylist() == [
            str(number) for number in range(unit.start, unit.stop)
        ]


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])
def test_scattered_units_of_several_files_are_read_in_one_go(
    format: str, tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    for number in range(3):
        path = tmp_path / "d" / f"{number}.{format}"
        ids = [f"{number}-{row}" for row in range(1000)]
        if format == "parquet":
            write_parquet(path, {"id": ids, "data": ["x" * 50] * 1000}, row_group_size=300)
        else:
            write(path, "\n".join(["id", *ids] if format == "csv" else [json.dumps({"id": name}) for name in ids]))
    found = load(tmp_path / "d")
    wanted = {0: [0, 1, 299, 300, 999], 2: [5, 6, 7, 400, 401, 998]}
    runs = {0: [(0, 2), (299, 301), (999, 1000)], 2: [(5, 7), (7, 8), (400, 402), (998, 999)]}
    units = [unit_of(found, number, start, stop) for number, spans in runs.items() for start, stop in spans]
    tables = list(read_units(found.spec, units, columns=["id"]))
    assert [table.num_rows for table in tables] == [unit.num_rows for unit in units]
    read = [name for table in tables for name in table["id"].to_pylist()]
    assert read == [f"{number}-{row}" for number, rows in wanted.items() for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints


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


def test_secrets_in_the_storage_options_are_not_shown(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    found = load(write_jsonl(tmp_path / "m.jsonl", [{"id": 1}]), storage_options={"secret": "hunter2"})
    assert "hunter2" not in repr(found) + repr(found.spec) + json.dumps(found.fingerprint())


# ---------------------------------------------------------------------------------------------------------------------
# A real S3 endpoint


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv", "media"])
def test_s3_manifests_of_every_format_are_read_through_faults(format: str, tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    from tests.servers.s3 import Fault, s3_server

    with s3_server() as server:
        server.make_bucket("bucket")
        options, root = server.storage_options, f"s3://bucket/{uuid.uuid4().hex}"
        ids = [f"{number:03d}.jpg" for number in range(300)]
        if format == "parquet":
            path = write_parquet(tmp_path / "m.parquet", {"id": ids}, row_group_size=50)
            storage.publish_file(path, f"{root}/m.parquet", options)
        elif format == "media":
            ids = ids[:5]
            for name in ids:
                storage.publish(f"{root}/{name}", b"x", options)
        else:
            lines = [json.dumps({"id": name}) for name in ids] if format == "jsonl" else ["id", *ids]
            storage.publish(f"{root}/m.{format}", "\n".join(lines).encode(), options)
        server.faults += [Fault(503, method="GET"), Fault(cut_after=100, method="GET")]
        listing = f"{root}-run/listing.parquet"
        for _ in range(2):  # the second time as a resumed job
            found = open_manifest(root, listing_path=listing, storage_options=options, listing_options=options)
            assert (found.format, found.base) == (format, root)
            server.faults += [Fault(503, method="GET"), Fault(cut_after=100, method="GET")]
            assert [row["id"] for row in rows_of(found, rows_per_unit=70)] == ids


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
