"""Reading many files of a run folder, and results in another type than they were written in."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow as pa

from pipeline.results.result_files import as_schema, read_in_order
from tests.unit.results.result_rows import new_folder


def test_files_are_read_several_at_once_in_order_and_not_far_ahead(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    together, begun, most = threading.Barrier(3), [], 0
    taken = 0

    def read(path: str) -> str:
        begun.append(path)
        if int(path) < 3:
            together.wait(timeout=60)  # which one at a time would never pass
        return path

    for path in read_in_order(folder, read, [str(number) for number in range(100)]):
        assert path == str(taken)
        taken += 1
        most = max(most, len(begun) - taken)
    assert taken == 100
    assert most < 20


def test_lists_and_numbers_in_a_column_that_became_text_are_json_as_in_a_manifest() -> None:
    table = pa.table(
        {
            "k": [[1, 2], None, []],
            "t": [["é", None], ['"'], None],
            "n": [1, None, 2**60 + 1],
            "f": [1.0, None, 2.5],
            "g": [1e16, float("nan"), float("-inf")],
        }
    )
    schema = pa.schema([(name, pa.string()) for name in table.column_names])
    assert as_schema(table, schema).to_pydict() == {
        "k": ["[1, 2]", None, "[]"],
        "t": ['["é", null]', r'["\""]', None],
        "n": ["1", None, "1152921504606846977"],
        "f": ["1.0", None, "2.5"],
        "g": ["1e+16", "NaN", "-Infinity"],
    }
