"""Two runs' scores of the same rows: the difference with its 95 % interval, and how likely chance alone makes it.

Rows that belong together, such as the questions about one video, are swapped and weighed as one. scipy's permutation
test holds all permutations of all rows, and cannot profit from scores that take few values. Knows numbers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.interval import NUM_BUCKETS, Z95, Combine, Floats, Ints, Tally

_MAX_SIZES = 2_048  # distinct differences in the permutation test
_NUM_CORPUS_PERMUTATIONS = 2_000  # each computes two corpus scores


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
    """Probability of a difference this large if the two runs were swapped at random for each row, or each group."""
    p_sign: float
    """Probability of winning or losing this unevenly if each row, or group, that differs were a coin toss."""
    won: int
    lost: int
    tied: int

    @property
    def verdict(self) -> Literal["better", "worse", "no difference found", "identical"]:
        """At the 1 % level of the permutation test."""
        if self.won == self.lost == 0 and not self.difference > 0 and not self.difference < 0:
            return "identical"
        if self.p_permutation >= 0.01:
            return "no difference found"
        return "better" if self.difference > 0 else "worse"


def compare(
    candidate: npt.ArrayLike,
    baseline: npt.ArrayLike,
    *,
    groups: Ints | None = None,
    maximum: float = 1.0,
    seed: int = 0,
) -> Comparison:
    """Means of two runs' scores of the same rows, in the same order. Rows of one group have the same number."""
    mine, theirs = np.asarray(candidate, np.float64), np.asarray(baseline, np.float64)
    if mine.shape != theirs.shape or mine.ndim != 1:
        raise ValueError(f"found scores of shapes {mine.shape} and {theirs.shape}; expected two of the same length")
    if not len(mine):
        return Comparison(0, math.nan, math.nan, math.nan, None, None, 1.0, 1.0, 0, 0, 0)
    differences = mine - theirs
    sums, sizes = _group_sums(differences, groups)
    low, high = paired_interval(sums, sizes, maximum) if len(sums) > 1 else (None, None)
    return Comparison(
        num_rows=len(mine),
        value=float(mine.mean()),
        baseline=float(theirs.mean()),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_permutation=permutation_p_value(sums, seed=seed),
        p_sign=sign_p_value(*_num_signs(sums)),
        **_counted(differences),
    )


def compare_corpora(
    candidate: Floats,
    baseline: Floats,
    combine: Combine,
    differences: Floats,
    *,
    groups: Ints | None = None,
    num_samples: int = 1_000,
    seed: int = 0,
) -> Comparison:
    """Corpus scores from two runs' statistics [rows, statistics] of the same rows, by resampling the corpus.

    `differences` are those of the rows' own scores, which count as won, lost or tied. There is no interval if no row
    differs.
    """
    size = candidate.shape[1]
    tally = Tally(lambda sums: combine(sums[..., :size]) - combine(sums[..., size:]))
    numbers = np.arange(len(candidate)) if groups is None else groups
    tally.add(np.hstack([candidate, baseline]), numbers)
    has_interval = len(np.unique(numbers)) > 1 and not np.array_equal(candidate, baseline)
    low, high = tally.bootstrap_interval(num_samples, seed) if has_interval else (None, None)
    values = combine(candidate.sum(axis=0)), combine(baseline.sum(axis=0))
    return Comparison(
        num_rows=len(candidate),
        value=float(values[0]),
        baseline=float(values[1]),
        difference=tally.value(),
        low=low,
        high=high,
        p_permutation=_corpus_p_value(candidate, baseline, combine, numbers, seed),
        p_sign=sign_p_value(*_num_signs(_group_sums(differences, groups)[0])),
        **_counted(differences),
    )


def _num_signs(differences: Floats) -> tuple[int, int]:
    return int((differences > 0).sum()), int((differences < 0).sum())


def _counted(differences: Floats) -> dict[str, int]:
    won, lost = _num_signs(differences)
    return {"won": won, "lost": lost, "tied": len(differences) - won - lost}


def _group_sums(differences: Floats, groups: Ints | None) -> tuple[Floats, Floats]:
    """Each group's sum and number of rows; without groups each row is one."""
    if groups is None:
        return differences, np.ones(len(differences))
    _, numbers = np.unique(groups, return_inverse=True)
    return np.bincount(numbers, differences).astype(np.float64), np.bincount(numbers).astype(np.float64)


def paired_interval(sums: Floats, sizes: Floats, maximum: float = 1.0) -> tuple[float, float]:
    """95 % interval of a mean difference, from each group's sum of differences and number of rows.

    For rows that are right or wrong it is that of Bonett and Price 2012 (doi:10.3102/1076998611411915): one row more
    won and one more lost keep its coverage where few rows differ, or none. Groups are added in the same way, and the
    size of the added differences is the largest that occurs; `maximum` if none does.
    """
    size = float(sizes.mean())
    added = size * (float(np.abs(sums / sizes).max()) or maximum)
    num_rows = float(sizes.sum()) + 2 * size
    centre = float(sums.sum()) / num_rows
    squares = float(((sums - centre * sizes) ** 2).sum()) + 2 * (added**2 + (centre * size) ** 2)
    half = Z95 * math.sqrt(squares) / num_rows
    return max(centre - half, -maximum), min(centre + half, maximum)


def permutation_p_value(differences: Floats, num_permutations: int = 20_000, seed: int = 0) -> float:
    """Two-sided p of the paired permutation test (Fisher 1935): every row's difference keeps or flips its sign.

    Rows with equal |difference| are flipped together by one binomial draw, so that a million rows of a metric with a
    few values cost as little as ten. Above 2,048 distinct values neighbours share their root mean square.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    if len(sizes) > _MAX_SIZES:
        groups = np.arange(len(sizes)) * _MAX_SIZES // len(sizes)
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
    from scipy.stats import binomtest  # of the extra `eval`: reports are made without it

    return float(binomtest(won, won + lost).pvalue)


def _corpus_p_value(candidate: Floats, baseline: Floats, combine: Combine, numbers: Ints, seed: int) -> float:
    """The permutation test of corpus scores: the two runs' statistics are swapped by bucket of groups."""
    sums, differences = (np.zeros((NUM_BUCKETS, candidate.shape[1])) for _ in range(2))
    np.add.at(sums, numbers % NUM_BUCKETS, candidate + baseline)
    np.add.at(differences, numbers % NUM_BUCKETS, candidate - baseline)
    differences = differences[differences.any(axis=1)]
    if not len(differences):
        return 1.0
    total = sums.sum(axis=0)
    observed = abs(float(combine(candidate.sum(axis=0)) - combine(baseline.sum(axis=0))))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (_NUM_CORPUS_PERMUTATIONS, len(differences)))
    swapped = signs @ differences
    found = np.abs(combine((total + swapped) / 2) - combine((total - swapped) / 2))
    return float(1 + (found >= observed - 1e-12).sum()) / (1 + _NUM_CORPUS_PERMUTATIONS)
