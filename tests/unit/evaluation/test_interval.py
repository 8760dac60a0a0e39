"""Streamed estimates and their intervals."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from pipeline.evaluation.interval import (
    NUM_BUCKETS,
    Estimate,
    Tally,
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
    equal = _estimate([0.3] * 30)
    assert (equal.low, equal.high) == pytest.approx((0.3, 0.3)), "equal scores other than 0 and 1 show no spread"
    assert (_estimate([0.02] * 30).high or 0) == pytest.approx(0.114, abs=0.001), "but not below what 30 rows can tell"


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


@pytest.mark.parametrize("num_rows", [5, 30, 300])
def test_intervals_at_the_edge_are_monotone(num_rows: int) -> None:
    few = [_estimate(np.arange(num_rows) < right) for right in range(4)]
    highs = [one.high or 0 for one in few]
    assert highs == sorted(highs) and len(set(highs)) == 4, "0 of 30 reaches less far than 1 of 30"
    lows = [one.low for one in [_estimate(np.arange(num_rows) >= wrong) for wrong in range(4)]]
    assert [1 - (low or 0) for low in lows] == pytest.approx(highs)
    nearly = _estimate(np.where(np.arange(num_rows) < 1, 0.3, 0))
    assert highs[0] <= (nearly.high or 0) <= highs[1]


def test_groups_are_resampled_as_one() -> None:
    rng = np.random.default_rng(7)
    scores = np.repeat(rng.random(300) < 0.6, 4).astype(float)
    groups = np.repeat(np.arange(300), 4)
    tally = Tally()
    for part in np.array_split(rng.permutation(1_200), 3):
        tally.add(scores[part], groups[part])
    by_group, by_row = tally.estimate(1_000, 0), _estimate(scores)
    assert by_group.value == pytest.approx(by_row.value) and by_group.num_rows == 1_200
    widths = [(one.high or 0) - (one.low or 0) for one in (by_group, by_row)]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.1), "four equal rows tell as much as one"
    alone = Tally()
    alone.add(np.ones(3), np.zeros(3, np.int64))
    assert alone.estimate(100, 0).method == "none"


def test_groups_of_one_row_have_the_interval_of_rows() -> None:
    scores = (np.arange(60) % 5 == 0).astype(float)
    tally = Tally()
    tally.add(scores, np.arange(60))
    by_group, by_row = tally.estimate(100, 0), _estimate(scores)
    assert (by_group.low, by_group.high) == pytest.approx((by_row.low, by_row.high), abs=0.002)


def test_the_edge_of_a_metric_with_another_scale_is_of_that_scale() -> None:
    tally = Tally(maximum=10.0)
    tally.add(np.zeros(30))
    assert tally.estimate(100, 0).high == pytest.approx(1.14, abs=0.01)
