"""Reading many files of a run folder."""

from __future__ import annotations

import threading
from pathlib import Path

from pipeline.results.result_files import read_in_order
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
