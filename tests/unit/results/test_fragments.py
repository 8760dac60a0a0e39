"""Finished rows on their way into fragments."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.manifest.row_set import RowNumbering, RowSet
from pipeline.results.fragments import FragmentWriter, take_new
from tests.unit.results.result_rows import SCHEMA, new_folder, rows


def test_rows_that_wait_too_long_are_published(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([2])
    out = FragmentWriter(folder, numbering, SCHEMA, 100, 0.05)
    out.add(rows([(0, 0)]))
    out.flush_if_old()
    assert folder.fragments() == []
    time.sleep(0.06)
    out.flush_if_old()
    assert len(folder.fragments()) == 1


def test_a_row_that_comes_twice_is_taken_once() -> None:
    numbering, done = RowNumbering([2, 3]), RowSet(5)
    first = take_new(rows([(0, 1), (1, 0), (0, 1)]), numbering, done)
    assert first.column("id").to_pylist() == ["0/1", "1/0"]
    second = take_new(rows([(1, 0), (1, 2)]), numbering, done)
    assert second.column("id").to_pylist() == ["1/2"]
    assert take_new(rows([(0, 1)]), numbering, done).num_rows == 0
    assert len(done) == 3
