"""Sets of manifest rows at one bit each, and the numbering of rows over all files.

Knows integers only. A row key is (file, row in that file); a row's index counts through all files in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class RowNumbering:
    """From row keys to indices, for manifest files of the given row counts."""

    def __init__(self, rows_per_file: Sequence[int]) -> None:
        self.first = np.zeros(len(rows_per_file) + 1, dtype=np.int64)
        """The index [files + 1] of each file's first row; the last one is the number of rows."""
        np.cumsum(rows_per_file, out=self.first[1:])

    @property
    def num_rows(self) -> int:
        """Rows in all files."""
        return int(self.first[-1])

    def indices(self, files: npt.NDArray[np.int32], rows: Indices) -> Indices:
        """Index [n] of each row key."""
        found: Indices = self.first[files] + rows
        return found


class RowSet:
    """A set of indices below `num_rows`, one bit each: 100 million rows take 12.5 MB."""

    def __init__(self, num_rows: int) -> None:
        self._bits = np.zeros((num_rows + 7) // 8, dtype=np.uint8)

    def add(self, indices: Indices) -> None:
        """Add indices [n], in any order; they may repeat."""
        np.bitwise_or.at(self._bits, indices >> 3, (1 << (indices & 7)).astype(np.uint8))

    def discard(self, indices: Indices) -> None:
        """Remove indices [n], whether or not they are in the set."""
        np.bitwise_and.at(self._bits, indices >> 3, ~(1 << (indices & 7)).astype(np.uint8))

    def has(self, indices: Indices) -> npt.NDArray[np.bool_]:
        """Whether each index [n] is in the set."""
        found: npt.NDArray[np.bool_] = (self._bits[indices >> 3] >> (indices & 7).astype(np.uint8)) & 1 == 1
        return found

    def mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Membership [stop - start] of a range of indices."""
        bits = np.unpackbits(self._bits[start >> 3 : (stop + 7) >> 3], bitorder="little")
        return bits[start & 7 : (start & 7) + stop - start].astype(bool)

    def __len__(self) -> int:
        return int(np.bitwise_count(self._bits).sum())
