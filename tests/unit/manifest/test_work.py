"""Units of work: every row that is left, once, large units first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.manifest import parquet
from pipeline.manifest.files import Manifest, ManifestFile
from pipeline.manifest.find import open_manifest
from pipeline.manifest.row_set import RowNumbering, RowSet
from pipeline.manifest.work import Retries, bundles, plan_work, read_work, read_works
from pipeline.schema import UnitColumn


def manifest_of(counts: list[int], size: int = 0) -> Manifest:
    files = tuple(ManifestFile(f"{n}.parquet", count, size, None) for n, count in enumerate(counts))
    return Manifest("m", "parquet", files, pa.schema([("prompt", pa.string())]), "m")


@given(st.lists(st.integers(0, 60), max_size=4), st.sets(st.integers(0, 239)), st.integers(1, 5), st.integers(1, 16))
def test_units_cover_just_the_rows_that_are_left(counts: list[int], done: set[int], actors: int, smallest: int) -> None:
    numbering = RowNumbering(counts)
    finished = RowSet(numbering.num_rows)
    done = {i for i in done if i < numbering.num_rows}
    finished.add(np.array(sorted(done), dtype=np.int64))
    planned = []
    for work in plan_work(manifest_of(counts), numbering, finished, actors=actors, min_rows=smallest, max_rows=40):
        assert work.num_rows == len(work.rows) <= 40
        assert 0 <= work.start < work.stop <= counts[work.file]
        planned += (numbering.first[work.file] + work.rows).tolist()
    assert planned == [i for i in range(numbering.num_rows) if i not in done]


def test_units_shrink_towards_the_end() -> None:
    numbering = RowNumbering([100_000])
    sizes = [
        work.num_rows
        for work in plan_work(manifest_of([100_000]), numbering, RowSet(100_000), actors=4, min_rows=8, max_rows=2048)
    ]
    assert sizes[0] == 2048
    assert sizes[-2] <= 8
    assert sizes == sorted(sizes, reverse=True)


def test_the_first_unit_is_an_actor_s_share_of_the_rows_that_are_left() -> None:
    finished = RowSet(600)
    finished.add(np.arange(200))
    for actors, size in ((1, 100), (4, 25), (50, 8)):
        works = plan_work(manifest_of([600]), RowNumbering([600]), finished, actors=actors, min_rows=8, max_rows=2048)
        assert next(works).num_rows == size


@pytest.mark.slow
def test_a_huge_manifest_has_a_bounded_number_of_units() -> None:
    numbering = RowNumbering([100_000_000])
    works = plan_work(manifest_of([100_000_000]), numbering, RowSet(100_000_000), actors=64, min_rows=8, max_rows=2048)
    assert sum(1 for _ in works) < 12_000


@pytest.mark.parametrize(("row_mib", "rows"), [(32, 2), (33, 1), (500, 1)])
def test_rows_with_large_files_inside_make_small_units(row_mib: int, rows: int) -> None:
    numbering = RowNumbering([1000])
    manifest = manifest_of([1000], size=1000 * row_mib * 1024**2)
    sizes = [
        work.num_rows for work in plan_work(manifest, numbering, RowSet(1000), actors=1, min_rows=8, max_rows=2048)
    ]
    assert max(sizes) == rows


def test_the_last_rows_are_a_unit_each_where_units_may_be_so_small() -> None:
    works = plan_work(manifest_of([5]), RowNumbering([5]), RowSet(5), actors=2, min_rows=1, max_rows=64)
    assert [work.num_rows for work in works] == [1] * 5


def test_retried_rows_of_every_file_have_their_own_attempt() -> None:
    numbering, retries = RowNumbering([3, 2, 4]), Retries(np.array([1, 4, 5, 8]), np.array([1, 2, 3, 4], np.int32))
    works = plan_work(manifest_of([3, 2, 4]), numbering, RowSet(9), actors=1, min_rows=8, max_rows=64, retries=retries)
    attempts = [work.attempts.tolist() for work in works if work.attempts is not None]
    assert attempts == [[1, 2, 1], [1, 3], [4, 1, 1, 5]]


def test_without_rows_to_retry_every_row_is_at_its_first_attempt() -> None:
    retries = Retries(np.array([], np.int64), np.array([], np.int32))
    (work,) = plan_work(
        manifest_of([3]), RowNumbering([3]), RowSet(3), actors=1, min_rows=8, max_rows=64, retries=retries
    )
    assert work.attempts is not None and work.attempts.tolist() == [1, 1, 1]


def test_reading_gives_the_wanted_rows_with_row_key_and_attempt(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(10)]}), tmp_path / "m.parquet")
    manifest = open_manifest(str(tmp_path / "m.parquet"), listing_path=str(tmp_path / "listing.parquet"))
    numbering, finished = RowNumbering([10]), RowSet(10)
    finished.add(np.array([0, 3, 4, 7, 9]))
    retries = Retries(np.array([2, 6]), np.array([1, 4], dtype=np.int32))
    works = list(plan_work(manifest, numbering, finished, actors=1, min_rows=8, max_rows=64, retries=retries))
    tables = [read_work(manifest.spec, work, ["prompt"]) for work in works]
    table = pa.concat_tables(tables)
    assert table.column("prompt").to_pylist() == ["p1", "p2", "p5", "p6", "p8"]
    assert table.column(UnitColumn.ROW).to_pylist() == [1, 2, 5, 6, 8]
    assert table.column(UnitColumn.FILE).to_pylist() == [0] * 5
    assert table.column(UnitColumn.ATTEMPTS).to_pylist() == [1, 2, 1, 5, 1]


def test_rows_between_those_to_retry_are_not_read(tmp_path: Path) -> None:
    """They may hold gigabytes of images. Here they hold rubbish, which reading would not survive."""
    path = tmp_path / "m.parquet"
    prompts = [f"p{i}" for i in range(300)]
    pq.write_table(pa.table({"prompt": prompts}), path, row_group_size=100, use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(0)
    with path.open("r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * column.total_compressed_size)
    manifest = open_manifest(str(path), listing_path=str(tmp_path / "listing.parquet"))
    finished = RowSet(300)
    finished.add(np.array([i for i in range(300) if i not in (5, 6, 299)]))
    (work,) = plan_work(manifest, RowNumbering([300]), finished, actors=1, min_rows=8, max_rows=64)
    assert read_work(manifest.spec, work, ["prompt"]).column("prompt").to_pylist() == ["p5", "p6", "p299"]


@pytest.mark.parametrize("done", [[], list(range(150, 190)), [99, 100, 299]])
def test_a_large_row_group_is_decoded_once_for_all_its_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: list[int]
) -> None:
    path = tmp_path / "m.parquet"
    sizes = [100, 200, 50, 300]  # rows of each row group; the second and fourth are large
    with pq.ParquetWriter(path, pa.schema([("id", pa.int64()), ("image", pa.binary())]), compression="none") as writer:
        for number, size in enumerate(sizes):
            first = sum(sizes[:number])
            images = [(b"%4d" % row) * (1000 if number % 2 else 1) for row in range(first, first + size)]
            writer.write_table(pa.table({"id": range(first, first + size), "image": images}))
    monkeypatch.setattr(parquet, "_LARGE_GROUP_BYTES", 200_000)
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 10)
    decoded = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(file: pq.ParquetFile, **options: Any) -> Iterator[pa.RecordBatch]:
        for batch in iter_batches(file, **options):
            decoded.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    manifest = open_manifest(str(path), listing_path="")
    assert manifest.files[0].large_groups == (100, 300, 350, 650)
    finished = RowSet(650)
    finished.add(np.array(done, np.int64))
    units = list(plan_work(manifest, RowNumbering([650]), finished, actors=2, min_rows=16, max_rows=30))
    section = manifest.files[0].section
    assert all(section(unit.start) == section(unit.stop - 1) for unit in units)
    together = bundles(units)
    rows = []
    for bundle in together:
        decoded.clear()
        for unit, table in zip(bundle, read_works(manifest.spec, bundle, ["id", "image"]), strict=True):
            assert table.num_rows == unit.num_rows <= 30
            rows += table.column("id").to_pylist()
        if bundle[0].shared is not None:
            assert sum(decoded) <= sizes[bundle[0].shared]
    assert rows == [row for row in range(650) if row not in done]
    assert [len({unit.shared for unit in bundle}) for bundle in together] == [1] * len(together)
    assert len([bundle for bundle in together if len(bundle) > 1]) == 2, "one for each large row group"
