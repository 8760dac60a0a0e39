"""Sets of rows, one bit each."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.manifest.row_set import RowSet


@given(st.integers(0, 200), st.lists(st.integers(0, 199), max_size=60), st.lists(st.integers(0, 199), max_size=30))
def test_a_row_set_is_a_set(size: int, added: list[int], dropped: list[int]) -> None:
    added, dropped = [i for i in added if i < size], [i for i in dropped if i < size]
    rows_in = RowSet(size)
    rows_in.add(np.array(added, dtype=np.int64))
    rows_in.discard(np.array(dropped, dtype=np.int64))
    expected = set(added) - set(dropped)
    assert len(rows_in) == len(expected)
    assert set(np.flatnonzero(rows_in.mask(0, size)).tolist()) == expected
    low, high = size // 3, size - size // 4
    assert set((np.flatnonzero(rows_in.mask(low, high)) + low).tolist()) == {i for i in expected if low <= i < high}
    assert rows_in.has(np.arange(size)).tolist() == [i in expected for i in range(size)]
