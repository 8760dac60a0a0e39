"""The pace of a run, and which stage held the other back."""

from __future__ import annotations

import time

import pytest

from pipeline.execution.progress import RunCounts, bottleneck, rate_text, starting_text
from tests.unit.results.result_rows import outcomes


def test_pace_runs_from_the_start_of_the_first_row_to_the_end_of_the_last() -> None:
    counts = RunCounts(
        total=600, done_before=0, rows=600, output_tokens=6000, started=100.0, rows_started=160.0, last_row=220.0
    )
    assert counts.pace() == (10.0, 100.0)
    counts.rows_started = None  # unknown: start-up counts
    assert counts.pace() == (5.0, 50.0)
    assert RunCounts(total=600, done_before=600).pace() == (0.0, 0.0)


def test_the_time_left_counts_the_time_of_the_first_table(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    counts = RunCounts(total=3_000, done_before=0, started=960.0)
    table = outcomes(*[None] * 100)
    counts.rows_started = 970.0
    counts.add(table)
    assert counts.line().startswith("100 of 3,000 rows, 3.33 rows/s")
    assert counts.line().endswith("14 min 30 s left")
    clock[0] += 10.0
    counts.add(table)
    assert counts.recent_pace()[0] == 200 / 40
    clock[0] += 25.0  # the first table is over half a minute old now
    counts.add(table)
    assert counts.recent_pace()[0] == 200 / 35
    clock[0] += 300.0  # tables that take longer than the window
    counts.add(table)
    assert counts.recent_pace()[0] == 100 / 300


def test_one_row_and_one_error_are_no_plurals() -> None:
    counts = RunCounts(total=1, done_before=0)
    counts.add(outcomes("MediaNotFound"))
    assert counts.line().startswith("1 of 1 row, ") and counts.line().endswith(", 1 error")


@pytest.mark.parametrize(
    ("busy", "idle", "unfilled", "actors", "told"),
    [
        (59.0, 41.0, 0.0, 3, "preprocessing held the engine back for 41% of the time: 3 more CPU actors"),
        (100.0, 0.0, 50.0, 8, "preprocessing held the engine back for 50% of the time: 8 more CPU actors"),
        (80.0, 20.0, 0.0, 2, "preprocessing held the engine back for 20% of the time: 1 more CPU actor "),
        (97.0, 2.0, 1.0, 3, "the engine was busy 97% of the time: more or faster engines would help"),
    ],
)
def test_the_bottleneck_is_named_with_what_to_change(
    busy: float, idle: float, unfilled: float, actors: int, told: str
) -> None:
    engine = {"kind": "engine", "busy_s": busy, "idle_s": idle, "unfilled_s": unfilled}
    sentence = bottleneck([*[{"kind": "preprocess", "busy_s": 90.0}] * actors, engine])
    assert sentence is not None
    assert sentence.startswith(told)


def test_slow_fetches_are_named_apart_from_preprocessing() -> None:
    engine = {"kind": "engine", "busy_s": 20.0, "idle_s": 80.0}
    slow = {"kind": "preprocess", "busy_s": 5.0, "fetch_wait_s": 95.0}
    assert (bottleneck([engine, slow]) or "").startswith(
        "fetching held the engine back for 80% of the time: CPU actors"
    )
    assert "waited for media 95% of theirs" in (bottleneck([engine, slow]) or "")
    busy = {"kind": "preprocess", "busy_s": 95.0, "fetch_wait_s": 5.0}
    assert (bottleneck([engine, busy]) or "").startswith("preprocessing held")


def test_a_run_too_short_to_tell_names_no_bottleneck() -> None:
    assert bottleneck([{"kind": "engine", "busy_s": 0.5, "idle_s": 0.1}]) is None
    assert bottleneck([]) is None


@pytest.mark.parametrize(
    ("rows_s", "expected"),
    [
        (1234.5, "1,234 rows/s"),
        (66.34, "66.3 rows/s"),
        (1.0, "1.00 rows/s"),
        (0.9999, "1.00 rows/s"),
        (0.5, "30.0 rows/min"),
        (4 / 211, "1.14 rows/min"),
        (1 / 3600, "1.00 rows/h"),
        (0.0, "0.00 rows/h"),
    ],
)
def test_a_rate_has_three_digits_whatever_its_size(rows_s: float, expected: str) -> None:
    assert rate_text(rows_s) == expected


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        ([], "starting actors"),
        ([{"kind": "preprocess", "rows": 40}], "40 rows preprocessed; the engine starts"),
        ([{"kind": "preprocess"}, {"kind": "engine"}], "engine: starting"),
        ([{"kind": "engine", "loading": "reading weights, tensor 3 of 5"}], "engine: reading weights, tensor 3 of 5"),
        (
            [{"kind": "engine", "decode_tokens": 0.0}, {"kind": "engine", "loading": "warming up"}],
            "1 of 2 engines ready; engine: warming up",
        ),
        (
            [{"kind": "preprocess", "rows": 1200}, {"kind": "engine", "decode_tokens": 3456.0}],
            "first rows: 1,200 preprocessed, 3,456 tokens generated",
        ),
    ],
)
def test_before_the_first_row_the_line_tells_what_is_going_on(stats: list[dict[str, object]], expected: str) -> None:
    assert starting_text(stats) == expected
    counts = RunCounts(total=9, done_before=0, state=expected, started=time.monotonic() - 17)
    assert counts.line().endswith(f"{expected} (17 s since the start)")
