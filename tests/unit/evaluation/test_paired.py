"""The paired comparison: difference, interval, permutation and sign test, by rows and by groups of rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.evaluation.paired import compare, compare_corpora, permutation_p_value, sign_p_value


def test_a_regression_is_found_with_the_right_sign() -> None:
    generator = np.random.default_rng(3)
    baseline = generator.random(500) < 0.95
    candidate = baseline & (generator.random(500) < 0.9)
    comparison = compare(candidate, baseline)
    assert comparison.verdict == "worse"
    assert comparison.difference < 0
    assert comparison.p_permutation < 0.01 and comparison.p_sign < 0.01
    assert comparison.high is not None and comparison.high < 0
    assert (comparison.won, comparison.lost) == (0, int((baseline & ~candidate).sum()))
    assert compare(baseline, candidate).verdict == "better"


def test_equal_runs_are_identical() -> None:
    scores = np.random.default_rng(4).random(100)
    comparison = compare(scores, scores)
    assert comparison.verdict == "identical"
    assert (comparison.won, comparison.lost, comparison.tied) == (0, 0, 100)
    assert comparison.difference == 0 and comparison.p_permutation == comparison.p_sign == 1


def test_a_comparison_of_no_rows_finds_nothing() -> None:
    comparison = compare([], [])
    assert comparison.num_rows == comparison.won == comparison.lost == comparison.tied == 0
    assert comparison.low is None and comparison.p_permutation == comparison.p_sign == 1
    assert math.isnan(comparison.difference) and comparison.verdict == "identical"
    with pytest.raises(ValueError, match="same length"):
        compare([1.0], [])


def test_a_permutation_p_value_is_never_zero() -> None:
    assert permutation_p_value(np.ones(1_000), 99) == pytest.approx(1 / 100)


def test_noise_is_significant_no_more_often_than_the_level() -> None:
    generator = np.random.default_rng(5)
    called = sum(permutation_p_value(generator.normal(size=60), 500, seed) < 0.05 for seed in range(200))
    assert called <= 20


def test_permutation_p_values_agree_with_all_sign_flips() -> None:
    differences = np.array([0.5, 1.0, -0.25, 0.75, 0.0, 1.5, 0.3])
    nonzero = differences[differences != 0]
    signs = 1 - 2 * (np.arange(2 ** len(nonzero))[:, None] >> np.arange(len(nonzero)) & 1)
    exact = (np.abs(signs @ nonzero) >= abs(nonzero.sum()) - 1e-12).mean()
    assert permutation_p_value(differences, 100_000) == pytest.approx(exact, abs=0.005)


@pytest.mark.slow
def test_permutation_p_values_of_many_distinct_differences_agree_with_the_normal_distribution() -> None:
    differences = np.random.default_rng(6).normal(0.01, 1.0, 40_000)
    z = abs(differences.sum()) / math.sqrt((differences**2).sum())
    assert permutation_p_value(differences, 10_000) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)


@pytest.mark.parametrize(("won", "lost", "p"), [(9, 1, 22 / 1024), (5, 5, 1.0), (0, 0, 1.0), (0, 8, 2 / 256)])
def test_the_sign_test_is_exact(won: int, lost: int, p: float) -> None:
    assert sign_p_value(won, lost) == pytest.approx(p)


def test_the_sign_test_of_a_million_rows_is_fast_and_finite() -> None:
    assert 0 < sign_p_value(500_500, 499_500) < 1
    assert sign_p_value(600_000, 400_000) == pytest.approx(0)


def test_the_interval_of_paired_proportions_is_that_of_bonett_and_price() -> None:
    won, lost, num_rows = 3, 1, 100
    differences = np.zeros(num_rows)
    differences[:won], differences[won : won + lost] = 1, -1
    found = compare(differences + 0.0, np.zeros(num_rows))
    more, less = (won + 1) / (num_rows + 2), (lost + 1) / (num_rows + 2)
    half = 1.959964 * math.sqrt((more + less - (more - less) ** 2) / (num_rows + 2))
    assert (found.low, found.high) == pytest.approx((more - less - half, more - less + half), abs=1e-6)
    none = compare(np.ones(num_rows), np.ones(num_rows))
    assert none.verdict == "identical" and none.low == pytest.approx(-(none.high or 0)) and (none.high or 0) > 0.02


def test_rows_of_a_group_are_swapped_and_weighed_as_one() -> None:
    rng = np.random.default_rng(8)
    gains = np.repeat(rng.choice([-1.0, 0.0, 1.0], 60, p=[0.15, 0.5, 0.35]), 5)
    groups = np.repeat(rng.permutation(60), 5)
    by_row, by_group = compare(gains, np.zeros(300)), compare(gains, np.zeros(300), groups=groups)
    one_each = compare(gains[::5], np.zeros(60))
    assert (by_group.low, by_group.high) == pytest.approx((one_each.low, one_each.high))
    assert by_group.p_sign == pytest.approx(one_each.p_sign) and by_group.p_sign > by_row.p_sign
    assert by_group.p_permutation == pytest.approx(one_each.p_permutation, abs=0.02)
    assert by_group.num_rows == 300 and by_group.won == by_row.won, "rows are counted as rows"


def _precision(sums: np.ndarray) -> np.ndarray:
    return np.asarray(sums[..., 0] / sums[..., 1])


def test_corpus_scores_are_compared_by_resampling_the_corpus() -> None:
    rng = np.random.default_rng(9)
    lengths = rng.integers(1, 40, 200)
    mine, theirs = (np.column_stack([rng.binomial(lengths, share), lengths]).astype(float) for share in (0.55, 0.45))
    own = [_precision(one) for one in (mine, theirs)]
    found = compare_corpora(mine, theirs, _precision, own[0] - own[1])
    assert found.value == pytest.approx(mine[:, 0].sum() / lengths.sum()), "the corpus score, no mean over rows"
    assert found.difference == pytest.approx(found.value - found.baseline)
    assert found.low is not None and found.high is not None and 0.05 < found.low < found.difference < found.high < 0.15
    assert found.verdict == "better" and found.won > found.lost
    swapped = mine.copy()
    swapped[::2], other = theirs[::2], theirs.copy()
    other[::2] = mine[::2]
    assert compare_corpora(swapped, other, _precision, np.zeros(200)).p_permutation > 0.05
    equal = compare_corpora(mine, mine, _precision, np.zeros(200))
    assert equal.verdict == "identical" and equal.low is None and equal.p_permutation == 1
