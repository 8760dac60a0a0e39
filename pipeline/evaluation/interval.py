"""How sure a score is: streamed means and corpus scores with bootstrap intervals, paired comparison of two runs.

Memory does not grow with rows. A `Tally` keeps one sum for each of 4,093 buckets; row i belongs to bucket i mod 4,093
(a prime, so that no period in the data lines up with it), and the bootstrap draws buckets. Up to 4,093 rows that is
the ordinary bootstrap; beyond, it is the bootstrap over random groups, whose variance has the same expectation.
Knows numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Combine = Callable[[Floats], Floats]

NUM_BUCKETS = 4_093
"""Sums kept by a tally unless it is told otherwise; prime."""
_CHUNK = 64  # bootstrap samples drawn at once: 64 x 4,093 indices are 2 MB
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A score with its 95 % interval."""

    value: float
    low: float | None
    high: float | None
    num_rows: int
    method: Literal["bootstrap", "wilson", "none"]
    """`wilson` where every row has the same score and the bootstrap would claim certainty; `none` for one row."""


class Tally:
    """Sums of per-row statistics, from which `combine` makes the score; for a plain mean one statistic a row.

    The last column handed to `combine` is the number of rows.
    """

    def __init__(self, num_statistics: int = 1, combine: Combine | None = None, num_buckets: int = NUM_BUCKETS) -> None:
        self.num_rows = 0
        self._num_buckets = num_buckets
        self._combine = combine or _mean
        self._sums = np.zeros((0, num_statistics + 1), np.float64)
        self._least, self._most = math.inf, -math.inf
        self._is_mean = combine is None

    def add(self, statistics: npt.ArrayLike) -> None:
        """Takes rows: [rows] or [rows, statistics]."""
        rows = np.asarray(statistics, np.float64)
        rows = rows.reshape(len(rows), -1)
        if not len(rows):
            return
        if self._is_mean:
            self._least, self._most = min(self._least, float(rows.min())), max(self._most, float(rows.max()))
        rows = np.column_stack([rows, np.ones(len(rows))])
        wanted = min(self.num_rows + len(rows), self._num_buckets)
        if wanted > len(self._sums):
            grown = np.zeros((min(max(wanted, 2 * len(self._sums), 64), self._num_buckets), rows.shape[1]))
            grown[: len(self._sums)] = self._sums
            self._sums = grown
        start = 0
        while start < len(rows):
            bucket = (self.num_rows + start) % self._num_buckets
            length = min(len(rows) - start, self._num_buckets - bucket)
            self._sums[bucket : bucket + length] += rows[start : start + length]
            start += length
        self.num_rows += len(rows)

    @property
    def buckets(self) -> Floats:
        """The sums in use: [buckets, statistics + 1]."""
        return self._sums[: min(self.num_rows, self._num_buckets)]

    def value(self) -> float:
        return float(self._combine(self.buckets.sum(axis=0))) if self.num_rows else math.nan

    def estimate(self, num_samples: int = 1_000, seed: int = 0) -> Estimate:
        """The score and its percentile bootstrap interval (Efron 1979), 95 %."""
        value = self.value()
        if self.num_rows < 2:
            return Estimate(value, None, None, self.num_rows, "none")
        if self._is_mean and self._least == self._most and self._least in (0.0, 1.0):
            low, high = wilson_interval(self._least * self.num_rows, self.num_rows)
            return Estimate(value, low, high, self.num_rows, "wilson")
        samples = np.concatenate([self._combine(sums) for sums in resampled_sums(self.buckets, num_samples, seed)])
        low, high = np.quantile(samples, [0.025, 0.975])
        return Estimate(value, float(low), float(high), self.num_rows, "bootstrap")


def _mean(sums: Floats) -> Floats:
    return np.asarray(sums[..., 0] / sums[..., 1])


def resampled_sums(buckets: Floats, num_samples: int, seed: int) -> Iterator[Floats]:
    """Sums over buckets drawn with replacement, [samples, statistics] at a time."""
    generator = np.random.default_rng(seed)
    count = len(buckets)
    for start in range(0, num_samples, _CHUNK):
        size = min(_CHUNK, num_samples - start)
        drawn = generator.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        yield times.astype(np.float64) @ buckets


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion: Wilson 1927. Says something even when all or none succeeded."""
    share, spread = successes / trials, _Z95**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = _Z95 * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    # Rounding must not leave 0.9999999999999999 where all succeeded.
    return (0.0 if successes <= 0 else centre - half), (1.0 if successes >= trials else centre + half)


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same rows. Differences are candidate less baseline."""

    num_rows: int
    value: float
    baseline: float
    difference: float
    low: float | None
    high: float | None
    p_permutation: float
    """Chance of a difference this large if the two runs' names were tossed for each row."""
    p_sign: float
    """Chance of winning or losing this unevenly if each row that differs were a toss of a coin."""
    won: int
    lost: int
    tied: int

    @property
    def verdict(self) -> Literal["better", "worse", "no difference found", "identical"]:
        """At the 1 % level of the permutation test, which asks for less than a significant interval may suggest."""
        if self.won == self.lost == 0:
            return "identical"
        if self.p_permutation >= 0.01:
            return "no difference found"
        return "better" if self.difference > 0 else "worse"


def compare(candidate: npt.ArrayLike, baseline: npt.ArrayLike, num_samples: int = 1_000, seed: int = 0) -> Comparison:
    """Paired comparison of two runs' scores of the same rows, in the same order."""
    mine, theirs = np.asarray(candidate, np.float64), np.asarray(baseline, np.float64)
    if mine.shape != theirs.shape or mine.ndim != 1:
        raise ValueError(f"scores of the same rows are needed; found shapes {mine.shape} and {theirs.shape}")
    if not len(mine):
        return Comparison(0, math.nan, math.nan, math.nan, None, None, 1.0, 1.0, 0, 0, 0)
    differences = mine - theirs
    tally = Tally(1, combine=_mean)  # not a proportion, so never Wilson's interval
    tally.add(differences)
    interval = tally.estimate(num_samples, seed)
    won, lost = int((differences > 0).sum()), int((differences < 0).sum())
    return Comparison(
        num_rows=len(mine),
        value=float(mine.mean()),
        baseline=float(theirs.mean()),
        difference=float(differences.mean()),
        low=interval.low,
        high=interval.high,
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
    if len(sizes) > 2_048:
        groups = np.arange(len(sizes)) * 2_048 // len(sizes)
        merged = np.bincount(groups, counts)
        sizes = np.sqrt(np.bincount(groups, counts * sizes**2) / merged)
        counts = merged.astype(np.int64)
    observed = abs(float(differences.sum()))
    generator = np.random.default_rng(seed)
    as_large = 0
    chunk = max(1, 2_000_000 // len(sizes))
    for start in range(0, num_permutations, chunk):
        size = min(chunk, num_permutations - start)
        positive = generator.binomial(counts, 0.5, (size, len(counts)))
        sums = np.abs((2 * positive - counts) @ sizes)
        as_large += int((sums >= observed * (1 - 1e-9)).sum())
    return (1 + as_large) / (1 + num_permutations)


def sign_p_value(won: int, lost: int) -> float:
    """Two-sided p of the exact sign test over rows that differ (Arbuthnot 1710): binomial with p = 1/2."""
    trials, fewer = won + lost, min(won, lost)
    if trials == 0:
        return 1.0
    log_half = -trials * math.log(2)
    choose = partial(_log_choose, trials)
    # Terms fall off quickly below the mean: stop once they no longer count.
    total, most = 0.0, choose(fewer) + log_half
    for successes in range(fewer, -1, -1):
        term = math.exp(choose(successes) + log_half - most)
        total += term
        if term < 1e-17 * total:
            break
    return min(1.0, 2 * math.exp(most) * total)


def _log_choose(trials: int, successes: int) -> float:
    return math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(trials - successes + 1)
