"""The ledger: rows that were there when an actor died run alone; those that die alone are given up."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.execution.supervision import Company, Ledger

A, B, C = (0, 1), (0, 2), (0, 3)


def test_rows_run_together_until_their_actor_dies() -> None:
    ledger = Ledger()
    ledger.born("x", "engine", None)
    assert ledger.begin("x", [A, B]) == {}
    ledger.end("x", [A])
    ledger.born("x", "engine", None)
    assert ledger.begin("x", [A, B, C]) == {B: 0}
    assert ledger.num_restarts() == 1


def test_a_killed_actor_holds_nothing_while_it_starts_again_and_its_death_counts_once() -> None:
    ledger = Ledger()
    ledger.born("x", "engine", None)
    ledger.begin_alone("x", A)
    ledger.killed("x")
    assert ledger.under_way() == []
    ledger.born("x", "engine", None)
    assert ledger.begin("x", [A]) == {A: 1}


def test_deaths_alone_are_counted_apart() -> None:
    ledger = Ledger()
    ledger.born("x", "engine", None)
    ledger.begin("x", [A])
    for lone_deaths in (0, 1, 2):
        ledger.born("x", "engine", None)
        assert ledger.begin("x", [A]) == {A: lone_deaths}
        ledger.begin_alone("x", A)


def test_a_row_that_ends_well_alone_leaves_nothing_open() -> None:
    ledger = Ledger()
    ledger.born("x", "engine", None)
    ledger.begin_alone("x", A)
    ledger.end("x", [A])
    assert ledger.under_way() == []


def test_the_oldest_row_of_each_actor_is_told() -> None:
    ledger = Ledger()
    ledger.born("x", "engine", "handle")
    ledger.begin("x", [A])
    time.sleep(0.01)
    ledger.begin("x", [B])
    ((who, kind, handle, place, age, still),) = ledger.under_way()
    assert (who, kind, handle, place) == ("x", "engine", "handle", A)
    assert age == still > 0  # that it was given another row is no sign of life


def test_an_actor_whose_figures_change_or_whose_rows_end_has_not_stood_still() -> None:
    ledger = Ledger()
    ledger.born("x", "engine", None)
    ledger.begin("x", [A, B])

    def stood_still_after(*what: Any) -> float:
        time.sleep(0.05)
        before = time.monotonic()
        getattr(ledger, what[0])("x", *what[1:])
        (*_, age, still) = ledger.under_way()[0]
        assert age >= 0.05
        return float(still - (time.monotonic() - before))

    assert stood_still_after("report", {"passes": 1.0}) < 0.01
    assert stood_still_after("report", {"passes": 2.0}) < 0.01
    assert stood_still_after("report", {"passes": 2.0}) >= 0.05
    assert stood_still_after("begin", [C]) >= 0.1
    assert stood_still_after("end", [B]) < 0.01


def test_one_alone_has_nobody_beside_it_and_does_not_starve() -> None:
    company, inside, seen = Company(), [0], []
    lock = threading.Lock()

    def enter(lone: bool) -> None:
        with company.alone() if lone else company.together():
            with lock:
                inside[0] += 1
            time.sleep(0.002)
            if lone:
                seen.append(inside[0])
            with lock:
                inside[0] -= 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(enter, [number % 10 == 5 for number in range(100)]))
    assert seen == [1] * 10


def test_work_begins_with_the_first_row_once_an_engine_is_up() -> None:
    ledger = Ledger()
    assert ledger.working_s() == 0.0
    ledger.born("p", "preprocess", None)
    ledger.begin("p", [A])
    assert ledger.working_s() == 0.0
    time.sleep(0.05)
    born = time.monotonic()
    ledger.born("e", "engine", None)
    assert 0.0 <= ledger.working_s() <= time.monotonic() - born
