"""How certain a score is: streamed means and corpus scores with their 95 % intervals.

Memory does not grow with rows. A `Tally` keeps one sum for each of 4,093 buckets; row i belongs to bucket i mod 4,093
(a prime, so that no period in the data lines up with it). A mean's variance is that of the buckets, and the bootstrap
of corpus scores draws buckets. Up to 4,093 rows that is each row by itself; beyond, random groups of them, whose
variance has the same expectation. Rows that belong together, such as the questions about one video, are added with the
number of their group and share its bucket. scipy's bootstrap holds all rows. Knows numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Combine = Callable[[Floats], Floats]

NUM_BUCKETS = 4_093
_CHUNK = 64  # bootstrap samples drawn at once: 64 x 4,093 indices are 2 MB
_LEAST_VARIANCE = 1e-18  # of rows that are all equal, with some rounding
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A score with its 95 % interval."""

    value: float
    low: float | None
    high: float | None
    num_rows: int
    method: Literal["bootstrap", "wilson", "none"]
    """`wilson` for means, `bootstrap` for corpus scores, `none` for one row or one group."""


class Tally:
    """Sums of per-row statistics. Without `combine` there is one statistic per row, and the score is its mean.

    `combine` computes scores [...] from sums [..., statistics]. `maximum` is the highest score that a row can have.
    """

    def __init__(self, combine: Combine | None = None, num_buckets: int = NUM_BUCKETS, *, maximum: float = 1.0) -> None:
        self.num_rows = 0
        self._combine = combine
        self._num_buckets = num_buckets
        self._maximum = maximum
        self._sums: Floats | None = None  # [buckets, statistics + 1]; the last column counts rows
        self._is_proportion = combine is None and maximum == 1.0
        self._has_groups = False

    def add(self, statistics: npt.ArrayLike, groups: Ints | None = None) -> None:
        """Adds rows: [rows] or [rows, statistics]; `groups` are numbers, equal for rows that belong together."""
        rows = np.asarray(statistics, np.float64)
        if not len(rows):
            return
        self._has_groups |= groups is not None
        self._is_proportion &= bool(np.isin(rows, (0, 1)).all())
        rows = np.column_stack([rows, np.ones(len(rows))])
        if self._sums is None:
            self._sums = np.zeros((self._num_buckets, rows.shape[1]))
        numbers = self.num_rows + np.arange(len(rows)) if groups is None else groups
        np.add.at(self._sums, numbers % self._num_buckets, rows)
        self.num_rows += len(rows)

    def value(self) -> float:
        return math.nan if self._sums is None else float(self._scores(self._sums.sum(axis=0)))

    def _scores(self, sums: Floats) -> Floats:
        return self._combine(sums[..., :-1]) if self._combine else np.asarray(sums[..., 0] / sums[..., 1])

    def estimate(self, num_samples: int, seed: int) -> Estimate:
        """The score and its 95 % interval."""
        value, num_groups = self.value(), len(self._filled()) if self._has_groups else self.num_rows
        if num_groups < 2:
            return Estimate(value, None, None, self.num_rows, "none")
        if self._combine is not None:
            return Estimate(value, *self.bootstrap_interval(num_samples, seed), self.num_rows, "bootstrap")
        share = min(max(value / self._maximum, 0.0), 1.0)
        size = self._effective_size(share, num_groups)
        low, high = wilson_interval(share * size, size)
        # Scores that hardly differ tell too little of what has not been seen: the interval reaches at least as far as
        # that of a proportion whose groups all failed, or all succeeded.
        unseen = wilson_interval(0, num_groups)[1]
        low, high = min(low, 1 - unseen), max(high, unseen)
        return Estimate(value, self._maximum * low, self._maximum * high, self.num_rows, "wilson")

    def _effective_size(self, share: float, num_groups: int) -> float:
        """Independent right or wrong rows that would have the mean's variance (Korn and Graubard 1998)."""
        if self._is_proportion and not self._has_groups:
            return self.num_rows
        if share in (0.0, 1.0):
            return num_groups
        sums = self._filled()
        residuals = sums[:, 0] / self._maximum - share * sums[:, 1]
        variance = len(sums) / (len(sums) - 1) * float((residuals**2).sum()) / self.num_rows**2
        return share * (1 - share) / max(variance, _LEAST_VARIANCE)

    def _filled(self) -> Floats:
        """The buckets that have rows."""
        return np.zeros((0, 2)) if self._sums is None else self._sums[self._sums[:, -1] > 0]

    def bootstrap_interval(self, num_samples: int, seed: int) -> tuple[float, float]:
        """Percentile bootstrap interval (Efron 1979) over the buckets that have rows. There must be a row."""
        sums = self._filled()
        rng = np.random.default_rng(seed)
        samples = []
        for start in range(0, num_samples, _CHUNK):
            drawn = rng.integers(0, len(sums), (min(_CHUNK, num_samples - start), len(sums)))
            times = np.array([np.bincount(sample, minlength=len(sums)) for sample in drawn], np.float64)
            samples.append(self._scores(times @ sums))
        low, high = np.quantile(np.concatenate(samples), [0.025, 0.975])
        return float(low), float(high)


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """95 % interval of a proportion: Wilson 1927. Informative even if all or none succeeded."""
    share, spread = successes / trials, Z95**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    # Exactly 0 if none succeeded, exactly 1 if all did: rounding must not leave 0.9999999999999999.
    return (0.0 if successes <= 0 else centre - half), (1.0 if successes >= trials else centre + half)
