"""Parquet manifests: units across row groups and files, and columns that differ between files."""

from __future__ import annotations

import io
import pickle
import re
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest import parquet
from pipeline.manifest.files import Manifest
from pipeline.manifest.work import read_work
from pipeline.schema import MANIFEST_ERROR
from tests.unit.manifest.manifests import (
    cut,
    read_unit,
    rows_of,
    write_parquet,
)


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_units_cut_across_row_groups_and_files(where: str, tmp_path: Path, load: Callable[..., Manifest]) -> None:
    counts = [10, 0, 7, 25]
    first = 0
    for number, count in enumerate(counts):
        path = write_parquet(
            tmp_path / "d" / f"{number}.parquet",
            {"id": pa.array(range(first, first + count), pa.int64()), "text": pa.array(["x"] * count, pa.string())},
            row_group_size=4,
        )
        first += count
        if where == "bucket":
            storage.publish_file(path, f"memory://{tmp_path.name}/d/{number}.parquet")
    found = load(tmp_path / "d" if where == "disk" else f"memory://{tmp_path.name}/d")
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


@pytest.mark.parametrize(("inner", "outer"), [(pa.string(), pa.large_string()), (pa.binary(), pa.large_binary())])
def test_files_that_spell_one_type_in_several_ways_are_one_manifest(
    inner: pa.DataType, outer: pa.DataType, tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    view = pa.string_view() if inner == pa.string() else pa.binary_view()
    kinds = [pa.dictionary(pa.int32(), inner), view, inner, outer, pa.dictionary(pa.int8(), outer)]
    for number, kind in enumerate(kinds):
        values = pa.array([f"v{number}"], inner)
        column = values.cast(kind)
        lists = pa.ListArray.from_arrays([0, 1], values.cast(view if kind == view else inner))
        write_parquet(tmp_path / "d" / f"{number}.parquet", {"c": column, "l": lists})
    found = load(tmp_path / "d")
    assert found.schema == pa.schema([("c", outer), ("l", pa.list_(inner))])
    texts = [row["c"] if inner == pa.string() else row["c"].decode() for row in rows_of(found)]
    assert texts == ["v0", "v1", "v2", "v3", "v4"]


def test_text_as_polars_writes_it_can_be_selected(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    write_parquet(tmp_path / "m.parquet", {"c": pa.array(["a", "b" * 40], pa.string_view())})
    found = load(tmp_path / "m.parquet")
    table = read_unit(found.spec, found.unit(0, 0, 2))
    assert table.take(pa.array([1, 0])).column("c").to_pylist() == ["b" * 40, "a"]


def test_a_type_that_arrow_does_not_know_is_named(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    frame = polars.DataFrame({"prompt": ["?"], "n": polars.Series([1], dtype=polars.Int128)})
    frame.write_parquet(tmp_path / "m.parquet")
    with pytest.raises(
        ManifestError, match=r"m\.parquet has a column that Arrow can't read: Integers with more than 64"
    ):
        load(tmp_path / "m.parquet")


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


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (pa.array(["a.jpg"]), pa.array([7]), "int64 in {2} but string in {1}"),
        (pa.array(["a.jpg"]), pa.array([b"jpeg"]), "binary in {2} but string in {1}"),
        (pa.array([Decimal("1.25")]), pa.array([7]), r"int64 in {2} but decimal128\(3, 2\) in {1}"),
    ],
)
def test_types_that_do_not_fit_name_both_files_and_types(
    first: pa.Array, second: pa.Array, shown: str, tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    write_parquet(tmp_path / "d" / "1.parquet", {"image": first})
    write_parquet(tmp_path / "d" / "2.parquet", {"image": second})
    files = [rf".*{number}\.parquet" for number in range(3)]
    with pytest.raises(ManifestError, match="column image is " + shown.format(*files)):
        load(tmp_path / "d")


def test_a_value_beyond_the_range_of_the_files_common_type_is_that_row_s_error(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    """pandas writes integers as floats in files where one is missing."""
    write_parquet(tmp_path / "d" / "1.parquet", {"n": [1, 2**60 + 1, 3, 4], "p": list("abcd")})
    write_parquet(tmp_path / "d" / "2.parquet", {"n": [1.5], "p": ["e"]})
    found = load(tmp_path / "d")
    whole = found.unit(0, 0, 4)
    table = read_work(found.spec, whole, ["n", "p"])
    assert table.column("n").to_pylist() == [1.0, None, 3.0, 4.0] and table.column("p").to_pylist() == list("abcd")
    fine, error, *_ = table.column(MANIFEST_ERROR).to_pylist()
    assert fine is None and re.match(
        r"column n of .*1\.parquet is int64 here and double in other files, which can't hold this row's: Integer", error
    )
    scattered = read_work(found.spec, replace(whole, selected=np.array([1, 3])), ["n"])  # two reads, one with an error
    assert [reason is None for reason in scattered.column(MANIFEST_ERROR).to_pylist()] == [False, True]


def test_a_footer_longer_than_the_end_that_is_read_first_is_read_whole(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    path = write_parquet(tmp_path / "m.parquet", {"id": list(range(3000))}, row_group_size=2)
    footer = pq.read_metadata(path)
    assert footer.serialized_size > parquet._TAIL_BYTES
    found = load(path)
    assert found.num_rows == 3000 and len(rows_of(found)) == 3000
    content = bytearray(path.read_bytes())
    place = content.index(footer.created_by.encode()[-4:], len(content) - footer.serialized_size)
    content[place] ^= 1
    path.write_bytes(content)
    assert load(path).files[0].digest != found.files[0].digest


def test_a_file_that_shrank_or_vanished_since_the_plan_is_noticed_where_its_size_and_version_are_unknown(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    path = write_parquet(tmp_path / "m.parquet", {"id": list(range(10))})
    found = load(path)
    unit = replace(found.unit(0, 0, 10), size=None, version=None)
    write_parquet(path, {"id": [1]})
    with pytest.raises(ManifestError, match="has 1 rows now but had at least 10"):
        read_unit(found.spec, unit)
    path.unlink()
    with pytest.raises(ManifestError, match="can't read rows 0 to 10"):
        read_unit(found.spec, unit)


def test_a_column_that_no_longer_fits_its_type_is_named(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    path = write_parquet(tmp_path / "m.parquet", {"id": [1]})
    found = load(path)
    unit = replace(found.unit(0, 0, 1), size=None, version=None)
    write_parquet(path, {"id": ["x"]})
    with pytest.raises(ManifestError, match=r"column id of .*m\.parquet is string and does not fit .* int64"):
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
