"""Kept columns of every Arrow type, from the manifest through fragments into parts and back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, ManifestError
from pipeline.manifest.find import open_manifest
from pipeline.manifest.row_set import RowNumbering, RowSet
from pipeline.manifest.work import plan_work, read_work
from pipeline.results import result_files
from pipeline.results.fragments import FragmentWriter
from pipeline.results.parts import check_partition, finalise, reopen
from pipeline.results.reader import RunReader
from pipeline.results.result_files import as_schema
from pipeline.results.run_folder import RunFolder
from pipeline.schema import MANIFEST_ROW, result_schema
from tests.unit.results.arrow_types import NUM_ROWS, columns
from tests.unit.results.result_rows import new_folder, rows

COLUMNS = dict(columns())
UNREADABLE = {f"list_view of {inner}_view" for inner in ("string", "binary")}
"""Arrow writes them, but can't change them into anything that it can handle."""
VIEWS = [f"{outer} of {inner}_view" for outer in ("dictionary", "struct") for inner in ("string", "binary")]
NOT_IN_PARQUET = {
    "dictionary of null",
    *VIEWS,
    *(name for name in COLUMNS if name.startswith("dictionary of extension")),
}
READABLE = sorted(COLUMNS.keys() - UNREADABLE - NOT_IN_PARQUET)


def as_text(column: pa.ChunkedArray) -> list[str]:
    """A form in which all values can be compared, NaN and -0.0 and dates after 9999 among them."""
    return [
        chunk.slice(row, 1).to_string(window=100, container_window=100)
        for chunk in column.chunks
        for row in range(len(chunk))
    ]


def results_of(path: Path, kept: pa.Table) -> tuple[RunFolder, RowNumbering]:
    """A run folder whose fragments hold these columns."""
    folder, numbering = new_folder(path), RowNumbering([NUM_ROWS])
    writer = FragmentWriter(folder, numbering, result_schema(kept.schema), 4, 60.0)
    answered = rows([(0, row) for row in range(NUM_ROWS)]).drop_columns(["tag"])
    for column in kept.schema:
        answered = answered.append_column(column, kept.column(column.name))
    for order in np.array_split(np.random.default_rng(0).permutation(NUM_ROWS), 3):
        writer.add(answered.take(pa.array(order)).select(result_schema(kept.schema).names))
    writer.flush()
    return folder, numbering


def check_that_all_come_back(names: list[str], *, rows_per_part: int, max_bytes: int, partition_by: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder_name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(result_files, "MAX_TABLE_BYTES", max_bytes)
        path = Path(folder_name)
        pq.write_table(pa.table({name: COLUMNS[name] for name in names}), path / "m.parquet")
        manifest = open_manifest(str(path / "m.parquet"), listing_path=str(path / "listing"))
        (unit,) = plan_work(manifest, RowNumbering([NUM_ROWS]), RowSet(NUM_ROWS), actors=1, min_rows=99, max_rows=99)
        kept = manifest.schema
        asked = read_work(manifest.spec, unit, kept.names)
        expected = pq.read_table(path / "m.parquet")
        folder, numbering = results_of(path, asked.select(kept.names))
        schema = result_schema(kept)
        for _ in range(2):
            num_parts = finalise(folder, numbering, schema, rows_per_part=rows_per_part, partition_by=partition_by)
            assert num_parts >= (NUM_ROWS if max_bytes == 1 else NUM_ROWS // rows_per_part)
            table = as_schema(pa.Table.from_batches(RunReader(folder.path).batches()), schema)
            table = table.sort_by(MANIFEST_ROW) if partition_by else table
            assert table.column(MANIFEST_ROW).to_pylist() == list(range(NUM_ROWS))
            for name in names:
                wanted = as_schema(expected.select([name]), pa.schema([kept.field(name)]))
                assert as_text(table.column(name)) == as_text(wanted.column(0)), name
            reopen(folder, numbering)


@pytest.mark.parametrize(("max_bytes", "partition_by"), [(1, "int8"), (1 << 30, None)])
def test_columns_of_every_type_are_written_merged_and_reopened(max_bytes: int, partition_by: str | None) -> None:
    names = [
        name
        for name in READABLE
        if " of " not in name or name.endswith(("of string", "of null", "of extension<arrow.uuid>"))
    ]
    assert len(names) > 50
    check_that_all_come_back(names, rows_per_part=5, max_bytes=max_bytes, partition_by=partition_by)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(READABLE), min_size=1, max_size=120, unique=True),
    st.integers(1, 5),
    st.sampled_from([1, 5_000, 1 << 30]),
    st.booleans(),
)
def test_columns_of_types_inside_types_are_written_merged_and_reopened(
    names: list[str], rows_per_part: int, max_bytes: int, by_text: bool
) -> None:
    names = [*names, *({"string"} - set(names))]
    check_that_all_come_back(
        names, rows_per_part=rows_per_part, max_bytes=max_bytes, partition_by="string" if by_text else None
    )


@pytest.mark.parametrize("name", sorted(UNREADABLE))
def test_a_type_that_arrow_can_not_read_is_refused_before_the_first_row(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"c": COLUMNS[name]}), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=r"column c is .*_view.*which can't be read.*write it as"):
        open_manifest(str(tmp_path / "m.parquet"), listing_path=str(tmp_path / "listing"))


@pytest.mark.parametrize("name", sorted(name for name in READABLE if " of " not in name or "dictionary" in name))
def test_parts_are_put_into_folders_by_every_type_that_is_not_refused_beforehand(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({name: COLUMNS[name]}), tmp_path / "m.parquet")
    manifest = open_manifest(str(tmp_path / "m.parquet"), listing_path=str(tmp_path / "listing"))
    column = manifest.schema.field(name)
    if "binary" in str(column.type) or "uuid" in name:
        with pytest.raises(ConfigError, match=r"whose values can't name folders; choose a column of text"):
            check_partition(column)
        return
    check_partition(column)
    kept = as_schema(pq.read_table(tmp_path / "m.parquet"), manifest.schema)
    folder, numbering = results_of(tmp_path, kept)
    finalise(folder, numbering, result_schema(kept.schema), rows_per_part=100, partition_by=name)
    table = pa.Table.from_batches(RunReader(folder.path).batches([name, MANIFEST_ROW])).sort_by(MANIFEST_ROW)
    assert as_text(table.column(name)) == as_text(kept.column(0))
    assert len(folder.parts()) == len(set(as_text(kept.column(0))))


def test_values_that_are_hard_to_name_have_folders_of_their_own(tmp_path: Path) -> None:
    texts = ["x" * 300, "x" * 299 + "y", "ä" * 200, "__HIVE_DEFAULT_PARTITION__", None, "..", "a/b"]
    folder, numbering = results_of(tmp_path, pa.table({"p": texts}))
    finalise(folder, numbering, result_schema(pa.schema([("p", pa.string())])), rows_per_part=100, partition_by="p")
    names = [Path(part).parent.name for part in folder.parts()]
    assert len(names) == 7 and len(set(names)) == 6 and max(len(name.encode()) for name in names) <= 255
    table = pa.Table.from_batches(RunReader(folder.path).batches(["p", MANIFEST_ROW])).sort_by(MANIFEST_ROW)
    assert table.column("p").to_pylist() == texts


@pytest.mark.parametrize("kind", [pa.list_(pa.int8()), pa.struct([("a", pa.int8())]), pa.map_(pa.string(), pa.int8())])
def test_nested_values_name_no_folders(kind: pa.DataType) -> None:
    with pytest.raises(ConfigError, match=r"partition_by: c is .*whose values can't name folders"):
        check_partition(pa.field("c", kind))
    with pytest.raises(ConfigError, match="too long for a folder"):
        check_partition(pa.field("c" * 200, pa.string()))
