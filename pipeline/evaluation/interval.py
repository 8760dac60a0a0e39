"""How certain a score is: streamed means and corpus scores with bootstrap intervals, paired comparison of two runs.

Memory does not grow with rows. A `Tally` keeps one sum for each of 4,093 buckets; row i belongs to bucket i mod 4,093
(a prime, so that no period in the data lines up with it), and the bootstrap draws buckets. Up to 4,093 rows that is
the ordinary bootstrap; beyond, it is the bootstrap over random groups, whose variance has the same expectation.
scipy's bootstrap and permutation test hold all rows, and cannot profit from scores that take few values.
Knows numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Combine = Callable[[Floats], Floats]

NUM_BUCKETS = 4_093
_CHUNK = 64  # bootstrap samples drawn at once: 64 x 4,093 indices are 2 MB
_Z95 = 1.959963984540054
_MAX_GROUPS = 2_048  # distinct differences in the permutation test


@dataclass(frozen=True)
class Estimate:
    """A score with its 95 % interval."""

    value: float
    low: float | None
    high: float | None
    num_rows: int
    method: Literal["bootstrap", "wilson", "none"]
    """`wilson` if all rows score 0 or all score 1, where the bootstrap would claim certainty; `none` for one row."""


class Tally:
    """Sums of per-row statistics. Without `combine` there is one statistic per row, and the score is its mean.

    `combine` computes scores [...] from sums [..., statistics].
    """

    def __init__(self, combine: Combine | None = None, num_buckets: int = NUM_BUCKETS) -> None:
        self.num_rows = 0
        self._combine = combine
        self._num_buckets = num_buckets
        self._sums: Floats | None = None  # [buckets, statistics + 1]; the last column counts rows
        self._min, self._max = math.inf, -math.inf

    def add(self, statistics: npt.ArrayLike) -> None:
        """Adds rows: [rows] or [rows, statistics]."""
        rows = np.asarray(statistics, np.float64)
        if not len(rows):
            return
        self._min, self._max = min(self._min, float(rows.min())), max(self._max, float(rows.max()))
        rows = np.column_stack([rows, np.ones(len(rows))])
        if self._sums is None:
            self._sums = np.zeros((self._num_buckets, rows.shape[1]))
        np.add.at(self._sums, (self.num_rows + np.arange(len(rows))) % self._num_buckets, rows)
        self.num_rows += len(rows)

    def value(self) -> float:
        return math.nan if self._sums is None else float(self._scores(self._sums.sum(axis=0)))

    def _scores(self, sums: Floats) -> Floats:
        return self._combine(sums[..., :-1]) if self._combine else np.asarray(sums[..., 0] / sums[..., 1])

    def estimate(self, num_samples: int, seed: int) -> Estimate:
        """The score and its 95 % interval."""
        value = self.value()
        if self.num_rows < 2:
            return Estimate(value, None, None, self.num_rows, "none")
        if self._combine is None and self._min == self._max and self._min in (0, 1):
            low, high = wilson_interval(self._min * self.num_rows, self.num_rows)
            return Estimate(value, low, high, self.num_rows, "wilson")
        low, high = self.bootstrap_interval(num_samples, seed)
        return Estimate(value, low, high, self.num_rows, "bootstrap")

    def bootstrap_interval(self, num_samples: int, seed: int) -> tuple[float, float]:
        """Percentile bootstrap interval (Efron 1979) over the buckets that have rows. There must be a row."""
        assert self._sums is not None
        sums = self._sums[: self.num_rows]
        rng = np.random.default_rng(seed)
        samples = []
        for start in range(0, num_samples, _CHUNK):
            drawn = rng.integers(0, len(sums), (min(_CHUNK, num_samples - start), len(sums)))
            times = np.array([np.bincount(sample, minlength=len(sums)) for sample in drawn], np.float64)
            samples.append(self._scores(times @ sums))
        low, high = np.quantile(np.concatenate(samples), [0.025, 0.975])
        return float(low), float(high)


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion: Wilson 1927. Informative even if all or none succeeded."""
    share, spread = successes / trials, _Z95**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = _Z95 * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    # Exactly 0 if none succeeded, exactly 1 if all did: rounding must not leave 0.9999999999999999.
    return (0.0 if successes <= 0 else centre - half), (1.0 if successes >= trials else centre + half)


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same rows. Differences are candidate minus baseline."""

    num_rows: int
    value: float
    baseline: float
    difference: float
    low: float | None
    high: float | None
    p_permutation: float
    """Probability of a difference this large if the two runs were swapped at random for each row."""
    p_sign: float
    """Probability of winning or losing this unevenly if each row that differs were a coin toss."""
    won: int
    lost: int
    tied: int

    @property
    def verdict(self) -> Literal["better", "worse", "no difference found", "identical"]:
        """At the 1 % level of the permutation test."""
        if self.won == self.lost == 0:
            return "identical"
        if self.p_permutation >= 0.01:
            return "no difference found"
        return "better" if self.difference > 0 else "worse"


def compare(candidate: npt.ArrayLike, baseline: npt.ArrayLike, num_samples: int = 1_000, seed: int = 0) -> Comparison:
    """Paired comparison of two runs' scores of the same rows, in the same order."""
    mine, theirs = np.asarray(candidate, np.float64), np.asarray(baseline, np.float64)
    if mine.shape != theirs.shape or mine.ndim != 1:
        raise ValueError(f"found scores of shapes {mine.shape} and {theirs.shape}; expected two of the same length")
    if not len(mine):
        return Comparison(0, math.nan, math.nan, math.nan, None, None, 1.0, 1.0, 0, 0, 0)
    differences = mine - theirs
    tally = Tally()
    tally.add(differences)
    # Always the bootstrap: a difference is no proportion, and that of equal rows is exactly 0.
    low, high = tally.bootstrap_interval(num_samples, seed) if len(mine) > 1 else (None, None)
    won, lost = int((differences > 0).sum()), int((differences < 0).sum())
    return Comparison(
        num_rows=len(mine),
        value=float(mine.mean()),
        baseline=float(theirs.mean()),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_permutation=permutation_p_value(differences, seed=seed),
        p_sign=sign_p_value(won, lost),
        won=won,
        lost=lost,
        tied=len(mine) - won - lost,
    )


def permutation_p_value(differences: Floats, num_permutations: int = 20_000, seed: int = 0) -> float:
    """Two-sided p of the paired permutation test (Fisher 1935): every row's difference keeps or flips its sign.

    Rows with equal |difference| are flipped together by one binomial draw, so that a million rows of a metric with a
    few values cost as little as ten. Above 2,048 distinct values neighbours share their root mean square.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    if len(sizes) > _MAX_GROUPS:
        groups = np.arange(len(sizes)) * _MAX_GROUPS // len(sizes)
        merged = np.bincount(groups, counts)
        sizes = np.sqrt(np.bincount(groups, counts * sizes**2) / merged)
        counts = merged.astype(np.int64)
    observed = abs(float(differences.sum()))
    rng = np.random.default_rng(seed)
    num_as_large = 0
    chunk = max(1, 2_000_000 // len(sizes))
    for start in range(0, num_permutations, chunk):
        size = min(chunk, num_permutations - start)
        positive = rng.binomial(counts, 0.5, (size, len(counts)))
        sums = np.abs((2 * positive - counts) @ sizes)
        num_as_large += int((sums >= observed * (1 - 1e-9)).sum())
    # The observed signs count as one more permutation, so p is never 0 (Phipson and Smyth 2010).
    return (1 + num_as_large) / (1 + num_permutations)


def sign_p_value(won: int, lost: int) -> float:
    """Two-sided p of the exact sign test over rows that differ (Arbuthnot 1710): binomial with p = 1/2."""
    if won == lost == 0:
        return 1.0
    from scipy.stats import binomtest  # of the extra `eval`: the planner uses this module without it

    return float(binomtest(won, won + lost).pvalue)
