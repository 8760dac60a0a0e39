"""What a resumed run finds in its folder: finished rows, and failed ones by type."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pipeline.manifest.row_set import RowNumbering
from pipeline.results.finished import read_finished
from pipeline.results.reader import count_errors
from tests.unit.results.result_rows import new_folder, rows, writer


def test_failed_rows_are_taken_by_type(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([4])
    out = writer(folder, numbering)
    out.add(rows([(0, 0)], status="error", text="FetchError"))
    out.add(rows([(0, 1)], status="error", text="MediaTimeout", attempts=3))
    out.add(rows([(0, 2)]))
    out.flush()
    finished = read_finished(folder, numbering)
    retries = finished.take_failed(["MediaTimeout"])
    assert (retries.indices.tolist(), retries.attempts.tolist()) == ([1], [3])
    assert finished.done.mask(0, 4).tolist() == [True, False, True, False]
    assert finished.failed["index"].to_pylist() == [0]
    assert finished.take_failed(None).indices.tolist() == [0]
    assert finished.done.mask(0, 4).tolist() == [False, False, True, False]


def test_a_folder_without_errors_has_none_to_retry(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([2])
    for _ in range(2):  # without any fragment, then with one that holds no error
        finished = read_finished(folder, numbering)
        assert finished.count_failed() == {}
        for types in (None, ["FetchError"]):
            retries = finished.take_failed(types)
            assert (retries.indices.tolist(), retries.attempts.tolist()) == ([], [])
        out = writer(folder, numbering)
        out.add(rows([(0, 1)]))
        out.flush()
    assert finished.done.mask(0, 2).tolist() == [False, True]


def test_error_types_of_many_fragments_are_counted_apart(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([30])
    out = writer(folder, numbering, 3)
    kinds = ["FetchError", "MediaTimeout", "EngineCrash", "MessageError"]
    for row in range(30):  # so that every fragment counts its types anew, in another order
        out.add(rows([(0, row)], status="ok" if row % 5 == 4 else "error", text=kinds[row % 7 % 4]))
    out.flush()
    expected = [kinds[row % 7 % 4] for row in range(30) if row % 5 != 4]
    finished = read_finished(folder, numbering)
    assert finished.failed["error_type"].to_pylist() == expected
    assert finished.count_failed() == count_errors(folder) == Counter(expected)
    retries = finished.take_failed(["MediaTimeout", "EngineCrash"])
    assert retries.indices.tolist() == [r for r in range(30) if r % 5 != 4 and kinds[r % 7 % 4] in kinds[1:3]]
    assert finished.count_failed().keys() == {"FetchError", "MessageError"}
