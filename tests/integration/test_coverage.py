"""How often 95 % intervals contain the truth, by simulation: the numbers that docs/evaluation.md states."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.interval import Tally, wilson_interval
from pipeline.evaluation.paired import compare_corpora, paired_interval

NUM_DRAWS = 600


@pytest.mark.parametrize("num_rows", [30, 100, 1_000])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5, 0.9])
def test_proportions(num_rows: int, share: float) -> None:
    drawn = np.random.default_rng(0).binomial(num_rows, share, 4_000)
    intervals = {int(right): wilson_interval(int(right), num_rows) for right in set(drawn)}
    covered = [intervals[int(right)][0] <= share <= intervals[int(right)][1] for right in drawn]
    assert 0.92 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("num_rows", [100, 1_000])
@pytest.mark.parametrize(
    "won, lost", [(0.0005, 0.0005), (0.002, 0.0), (0.01, 0.0), (0.01, 0.01), (0.05, 0.02), (0.2, 0.1)]
)
def test_paired_proportions_where_few_rows_differ_or_many(num_rows: int, won: float, lost: float) -> None:
    rng, covered = np.random.default_rng(1), 0
    for _ in range(NUM_DRAWS):
        counts = rng.multinomial(num_rows, [won, lost, 1 - won - lost])
        low, high = paired_interval(np.repeat([1.0, -1.0, 0.0], counts), np.ones(num_rows))
        covered += low <= won - lost <= high
    assert covered / NUM_DRAWS >= 0.92


@pytest.mark.parametrize(
    "num_groups, size, correlation, share",
    [(20, 3, 0.5, 0.7), (50, 9, 0.5, 0.7), (200, 9, 0.3, 0.7), (900, 3, 0.5, 0.7), (200, 9, 0.8, 0.95),
     (50, 9, 0.8, 0.95), (20, 5, 0.5, 0.9), (100, 5, 0.5, 0.02), (300, 3, 0.9, 0.99)],
)  # fmt: skip
def test_groups_are_covered_where_single_rows_are_not(
    num_groups: int, size: int, correlation: float, share: float
) -> None:
    rng = np.random.default_rng(2)
    covered = np.zeros(4)
    for draw in range(NUM_DRAWS):
        sizes = np.full(num_groups, size) if draw % 2 else rng.integers(1, 2 * size, num_groups)
        groups = np.repeat(np.arange(num_groups), sizes)
        odds = 1 / correlation - 1
        right = rng.random(len(groups)) < rng.beta(share * odds, (1 - share) * odds, num_groups)[groups]
        tally = Tally()
        tally.add(right, groups)
        estimate = tally.estimate(1, 0)
        of_row = wilson_interval(right.sum(), len(right))
        covered[:2] += of_row[0] <= share <= of_row[1], (estimate.low or 0) <= share <= (estimate.high or 1)
        # Two runs: 60 % of the rows of some groups gain or lose.
        gains = rng.choice([-1.0, 0.0, 1.0], num_groups, p=[0.1, 0.75, 0.15])[groups] * (rng.random(len(groups)) < 0.6)
        by_row, by_group = (
            paired_interval(gains, np.ones(len(gains))),
            paired_interval(np.bincount(groups, gains), sizes.astype(float)),
        )
        covered[2:] += [low <= 0.05 * 0.6 <= high for low, high in (by_row, by_group)]
    row, group, paired_row, paired_group = covered / NUM_DRAWS
    assert max(row, paired_row) < 0.9 and 0.91 <= group <= 0.99 and paired_group >= 0.92


@pytest.mark.parametrize("num_rows", [30, 100])
@pytest.mark.parametrize(
    "maximum, zeros, a, b", [(1, 0.3, 9, 1), (1, 0.1, 40, 2), (1, 0, 2, 3), (10, 0, 0.5, 4.5), (1, 0.95, 1, 1)]
)
def test_means_of_other_scores(num_rows: int, maximum: float, zeros: float, a: float, b: float) -> None:
    rng, covered, truth = np.random.default_rng(4), 0, maximum * (1 - zeros) * a / (a + b)
    for _ in range(NUM_DRAWS):
        tally = Tally(maximum=maximum)
        tally.add(maximum * rng.beta(a, b, num_rows) * (rng.random(num_rows) >= zeros))
        found = tally.estimate(1, 0)
        covered += (found.low or 0) <= truth <= (found.high or 0)
    assert 0.92 <= covered / NUM_DRAWS <= 0.99


@pytest.mark.parametrize("num_rows", [50, 200])
def test_differences_of_corpus_scores(num_rows: int) -> None:
    rng, covered, num_found = np.random.default_rng(3), 0, 0

    def precision(sums: np.ndarray) -> np.ndarray:
        return np.asarray(sums[..., 0] / sums[..., 1])

    for draw in range(NUM_DRAWS // 3):
        lengths, shares = rng.integers(3, 30, num_rows), rng.beta(4, 6, num_rows)
        runs = [np.column_stack([rng.binomial(lengths, shares), lengths]).astype(float) for _ in range(2)]
        gains = precision(runs[0]) - precision(runs[1])
        found = compare_corpora(runs[0], runs[1], precision, gains, num_samples=400, seed=draw)
        assert found.low is not None and found.high is not None
        covered += found.low <= 0 <= found.high
        num_found += found.p_permutation < 0.05
    assert covered / (NUM_DRAWS // 3) >= 0.9 and num_found / (NUM_DRAWS // 3) <= 0.08
