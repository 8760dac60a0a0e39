"""Fragments to part files: manifest order, every row once, whatever order and overlap they came in."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import OutputError
from pipeline.manifest.row_set import RowNumbering
from pipeline.results import result_files
from pipeline.results.finished import read_finished
from pipeline.results.parts import finalise, reopen, restore_success
from pipeline.results.run_folder import RunFolder
from tests.unit.results.result_rows import SCHEMA, new_folder, rows, writer


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.randoms(), st.integers(1, 9), st.integers(1, 7))
def test_parts_hold_every_row_once_in_manifest_order(
    counts: list[int], random, per_part: int, per_fragment: int
) -> None:  # type: ignore[no-untyped-def]
    with tempfile.TemporaryDirectory() as path:
        folder, numbering = new_folder(Path(path)), RowNumbering(counts)
        row_keys = [(file, row) for file, count in enumerate(counts) for row in range(count)]
        again = [row_key for row_key in row_keys if random.random() < 0.3]  # a crash makes rows come twice
        arriving = row_keys + again
        random.shuffle(arriving)
        out = writer(folder, numbering, per_fragment)
        for row_key in arriving:
            out.add(rows([row_key]))
        out.flush()
        finalise(folder, numbering, SCHEMA, rows_per_part=per_part)
        parts = [pq.read_table(part) for part in folder.parts()]
        table = pa.concat_tables(parts)
        assert table.column("id").to_pylist() == [f"{file}/{row}" for file, row in row_keys]
        assert table.column("tag").to_pylist() == [f"tag {file}/{row}" for file, row in row_keys]
        assert all(part.num_rows == per_part for part in parts[:-1])
        assert folder.is_finished()


def test_fragments_and_parts_of_large_rows_are_cut_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_files, "MAX_TABLE_BYTES", 20_000)
    monkeypatch.setattr(result_files, "_BYTES_PER_GROUP", 5_000)
    folder, numbering = new_folder(tmp_path), RowNumbering([70])
    sizes = [10] * 30 + [7_000] * 8 + [30_000] * 2 + [10] * 30
    out = writer(folder, numbering, 1_000)
    for first in (0, 35):
        pieces = [rows([(0, row)], text="x" * sizes[row]) for row in range(first, first + 35)]
        out.add(pa.concat_tables(pieces).combine_chunks())
    assert len(folder.fragments()) > 4, "a table above the limit is published at once, in pieces"
    out.flush()
    fragments = [pq.read_table(path) for path in folder.fragments()]
    finalise(folder, numbering, SCHEMA, rows_per_part=40)
    parts = [pq.read_table(part) for part in folder.parts()]
    for table in [*fragments, *parts]:
        assert table.num_rows == 1 or table.nbytes <= 20_000 + 500  # and a few bytes of padding
    assert pa.concat_tables(parts).column("manifest_row").to_pylist() == list(range(70))
    assert parts[0].num_rows > 8 and parts[-1].num_rows > 8, (
        "parts of small rows are larger, also behind the large ones"
    )
    large = [
        path for part, path in zip(parts, folder.parts(), strict=True) if part.num_rows > 1 and part.nbytes > 10_000
    ]
    assert large and all(pq.ParquetFile(path).num_row_groups > 1 for path in large)


def test_a_missing_row_is_refused_and_nothing_is_marked_finished(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([3])
    out = writer(folder, numbering)
    out.add(rows([(0, 0), (0, 2)]))
    out.flush()
    with pytest.raises(OutputError, match="rows 0 to 2 of the manifest have 2 results, expected 3"):
        finalise(folder, numbering, SCHEMA, rows_per_part=10)
    assert not folder.is_finished()
    assert folder.fragments()


def test_an_answer_wins_over_errors_and_a_later_error_over_an_earlier(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([3])
    out = writer(folder, numbering, 1)
    out.add(rows([(0, 0)], status="error", text="Old"))
    out.add(rows([(0, 0)], text="answer", attempts=1))
    out.add(rows([(0, 0)], status="error", text="New", attempts=2))
    out.add(rows([(0, 1)], status="error", text="New", attempts=2))
    out.add(rows([(0, 1)], status="error", text="Old", attempts=1))
    out.add(rows([(0, 2)]))
    finished = read_finished(folder, numbering)
    assert finished.failed["index"].to_pylist() == [1]
    assert finished.count_failed() == {"New": 1}
    assert finished.failed["attempts"].to_pylist() == [2]
    finalise(folder, numbering, SCHEMA, rows_per_part=10)
    table = pq.read_table(folder.parts()[0])
    assert table.column("text").to_pylist() == ["answer", None, "t"]
    assert table.column("error_type").to_pylist() == [None, "New", None]


def test_reopening_a_finished_folder_loses_no_row(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([5])
    out = writer(folder, numbering)
    out.add(rows([(0, row) for row in range(5)]))
    finalise(folder, numbering, SCHEMA, rows_per_part=2)
    before = pa.concat_tables([pq.read_table(part) for part in folder.parts()])
    reopen(folder, numbering)
    assert not folder.is_finished()
    assert folder.parts() == []
    assert len(read_finished(folder, numbering).done) == 5
    finalise(folder, numbering, SCHEMA, rows_per_part=4)
    assert pa.concat_tables([pq.read_table(part) for part in folder.parts()]).equals(before)


class _Killed(Exception):
    pass


def _two_runs(folder: RunFolder, numbering: RowNumbering) -> None:
    """A run to its end, and another that adds a row to the finished folder."""
    for num_rows, new, rows_per_part in ((5, range(5), 2), (6, [5], 3)):
        total = RowNumbering([num_rows])
        if folder.is_finished():
            reopen(folder, total)
        folder.write_run({"state": "running", "manifest": {"num_rows": num_rows}})
        out = writer(folder, numbering, 2)
        out.add(rows([(0, row) for row in new]))
        out.flush()
        finalise(folder, total, SCHEMA, rows_per_part=rows_per_part)
        folder.write_run({"state": "finished", "manifest": {"num_rows": num_rows}})
        folder.delete_fragments()


def _kill_before_change(folder: RunFolder, number: int) -> None:
    left = iter(range(number))

    def guard() -> None:
        if next(left, None) is None:
            raise _Killed

    folder.guard = guard


@pytest.mark.parametrize("loses_success", [False, True])
def test_a_run_that_is_killed_before_any_of_its_changes_loses_no_row(tmp_path: Path, loses_success: bool) -> None:
    """With `loses_success` a sync leaves `_SUCCESS` out besides."""
    numbering, was_killed = RowNumbering([6]), True
    for change in itertools.count(1):
        (tmp_path / str(change)).mkdir()
        folder = new_folder(tmp_path / str(change))
        _kill_before_change(folder, change)
        try:
            _two_runs(folder, numbering)
        except _Killed:
            pass
        else:
            was_killed = False
        folder.guard = lambda: None
        record = folder.read_run()
        assert record is not None
        files = [*folder.fragments(), *folder.parts()]
        published = {row for path in files for row in pq.read_table(path)["manifest_row"].to_pylist()}
        if loses_success:
            folder.mark_unfinished()
        restore_success(folder, record)
        total = RowNumbering([record["manifest"]["num_rows"]])
        assert len(read_finished(folder, total).done) == len(published), f"change {change}"
        if len(published) == total.num_rows:
            if not folder.is_finished():
                finalise(folder, total, SCHEMA, rows_per_part=4)
            table = pa.concat_tables([pq.read_table(part) for part in folder.parts()])
            assert table["manifest_row"].to_pylist() == list(range(total.num_rows)), f"change {change}"
        if not was_killed:
            break
    assert change > 20


def test_success_that_alone_is_lost_is_written_again(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([6])
    _two_runs(folder, numbering)
    record = folder.read_run() or {}
    assert not restore_success(folder, record), "it is there"
    folder.mark_unfinished()
    assert restore_success(folder, record) and folder.is_finished()


def test_parts_without_success_that_lack_rows_are_refused_and_left_alone(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([6])
    _two_runs(folder, numbering)
    folder.mark_unfinished()
    first, second = map(Path, folder.parts())
    first.unlink()
    with pytest.raises(OutputError, match=r"no _SUCCESS, and they hold 3 rows, where .*run\.json says 6: put back"):
        restore_success(folder, folder.read_run() or {})
    second.write_bytes(b"half")
    with pytest.raises(OutputError, match=r"no _SUCCESS, and can't be read"):
        restore_success(folder, folder.read_run() or {})
    assert folder.parts() == [str(second)] and not folder.is_finished()
    second.unlink()
    assert not restore_success(folder, folder.read_run() or {}), "all rows are run again"


def test_parts_may_be_partitioned_by_a_column_and_reopened_without_loss(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([6])
    out = writer(folder, numbering)
    table = rows([(0, row) for row in range(6)])
    tags = pa.array(["a", "b/c", None, "a", "b/c", "a"])
    table = table.set_column(table.column_names.index("tag"), "tag", tags)
    out.add(table)
    out.flush()
    finalise(folder, numbering, SCHEMA, rows_per_part=4, partition_by="tag")
    found = sorted(str(Path(part).relative_to(folder.path)) for part in folder.parts())
    assert found == [
        "tag=__HIVE_DEFAULT_PARTITION__/part-00002.parquet",
        "tag=a/part-00000.parquet",
        "tag=a/part-00004.parquet",
        "tag=b%2Fc/part-00001.parquet",
        "tag=b%2Fc/part-00003.parquet",
    ]
    assert len(read_finished(folder, numbering).done) == 6
    hive = pa.dataset.dataset(folder.parts(), partitioning="hive", partition_base_dir=folder.path).to_table()
    assert sorted(zip(hive["id"].to_pylist(), hive["tag"].to_pylist(), strict=True)) == [
        (f"0/{row}", tags[row].as_py()) for row in range(6)
    ]
    reopen(folder, numbering)
    finalise(folder, numbering, SCHEMA, rows_per_part=10)
    assert pq.read_table(folder.parts()[0]).column("tag").to_pylist() == tags.to_pylist()


def test_stale_parts_of_an_interrupted_finalise_are_removed(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([4])
    out = writer(folder, numbering)
    out.add(rows([(0, row) for row in range(4)]))
    out.flush()
    Path(folder.part("part-00007.parquet")).write_bytes(b"half")
    finalise(folder, numbering, SCHEMA, rows_per_part=2)
    assert [Path(part).name for part in folder.parts()] == ["part-00000.parquet", "part-00001.parquet"]


def test_an_empty_manifest_finishes_with_one_empty_part(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([])
    assert finalise(folder, numbering, SCHEMA, rows_per_part=10) == 1
    assert pq.read_table(folder.parts()[0]).schema.equals(SCHEMA)


def test_parts_are_readable_by_pandas(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([2])
    out = writer(folder, numbering)
    out.add(rows([(0, 0)]))
    out.add(rows([(0, 1)], status="error", text="FetchError"))
    out.flush()
    finalise(folder, numbering, SCHEMA, rows_per_part=10)
    frame = pd.concat(pd.read_parquet(part) for part in folder.parts())
    assert frame["status"].tolist() == ["ok", "error"]
    assert list(frame.columns) == SCHEMA.names
