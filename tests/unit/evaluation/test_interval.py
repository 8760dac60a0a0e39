"""Streamed estimates, bootstrap intervals, and the paired comparison."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from pipeline.evaluation.interval import (
    NUM_BUCKETS,
    Estimate,
    Tally,
    compare,
    permutation_p_value,
    sign_p_value,
    wilson_interval,
)


def _tally(scores: object) -> Tally:
    tally = Tally()
    tally.add(np.asarray(scores))
    return tally


def _estimate(scores: object, num_samples: int = 1_000) -> Estimate:
    return _tally(scores).estimate(num_samples, seed=0)


def test_the_mean_of_a_stream_does_not_depend_on_its_batches() -> None:
    scores = np.random.default_rng(0).random(10_000)
    tally = Tally()
    for batch in np.array_split(scores, 37):
        tally.add(batch)
    assert tally.value() == pytest.approx(scores.mean())
    assert tally.estimate(100, 0).low == _estimate(scores, 100).low


@pytest.mark.parametrize("num_rows", [400, 50_000])
def test_the_interval_agrees_with_theory_with_and_without_shared_buckets(num_rows: int) -> None:
    scores = np.random.default_rng(1).random(num_rows)
    estimate = _estimate(scores, 4_000)
    half = 1.96 * scores.std() / math.sqrt(num_rows)
    assert estimate.low is not None and estimate.high is not None
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.08)
    assert (estimate.high + estimate.low) / 2 == pytest.approx(scores.mean(), abs=0.15 * half)


def test_95_of_100_intervals_contain_the_true_score() -> None:
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        estimate = _estimate(generator.random(120) < 0.7, 500)
        assert estimate.low is not None and estimate.high is not None
        hits += estimate.low <= 0.7 <= estimate.high
    assert 0.90 <= hits / 300 <= 0.98


def test_rows_that_are_all_right_or_all_wrong_give_wilsons_interval() -> None:
    right, wrong = _estimate([1] * 30), _estimate([0] * 30)
    assert right.method == wrong.method == "wilson"
    assert right.value == right.high == 1 and right.low == pytest.approx(0.886, abs=0.001)
    assert wrong.value == wrong.low == 0 and wrong.high == pytest.approx(0.114, abs=0.001)
    assert _estimate([0.5] * 30).method == "bootstrap", "only for proportions"


def test_the_bootstrap_draws_only_buckets_that_have_rows() -> None:
    sums = []

    def combine(rows: np.ndarray) -> np.ndarray:
        sums.append(rows)
        return rows[..., 0]

    tally = Tally(combine)
    tally.add(np.ones(3))
    tally.add(np.ones(2))
    assert tally.estimate(200, 0).low == 5, "each of five draws is a row"
    assert all((drawn == 5).all() for drawn in sums)


def test_one_row_has_no_interval_and_no_rows_have_no_value() -> None:
    assert _estimate([0.5]).low is None
    assert math.isnan(Tally().value())


def test_wilsons_interval_of_a_published_example() -> None:
    # Newcombe 1998 (Statistics in Medicine 17:857), table I: 81 of 263 give 0.2553 to 0.3662.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_memory_of_a_tally_does_not_grow_with_rows() -> None:
    tally = _tally(np.zeros(NUM_BUCKETS))
    tracemalloc.start()
    for _ in range(200):
        tally.add(np.ones(5_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tally.num_rows == NUM_BUCKETS + 1_000_000
    assert peak < 1_000_000


def test_a_corpus_score_is_combined_from_sums_not_averaged() -> None:
    tally = Tally(lambda sums: sums[..., 0] / sums[..., 1])
    tally.add(np.array([[1, 1], [1, 9]]))
    assert tally.value() == pytest.approx(0.2)


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
