"""Rows that were in progress when an actor died run alone; those that die alone are given up."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipeline.execution.supervision import OpenUnits, ReadWriteLock, Supervisor
from pipeline.manifest.files import WorkUnit

A, B, C = (0, 1), (0, 2), (0, 3)


def test_rows_run_together_until_their_actor_dies() -> None:
    supervisor = Supervisor()
    supervisor.started("x", "engine", None)
    assert supervisor.begin("x", [A, B]) == {}
    supervisor.end("x", [A])
    supervisor.started("x", "engine", None)
    assert supervisor.begin("x", [A, B, C]) == {B: 0}


def test_a_killed_actor_holds_nothing_while_it_starts_again_and_its_death_counts_once() -> None:
    supervisor = Supervisor()
    supervisor.started("x", "engine", None)
    supervisor.begin_alone("x", A)
    supervisor.died("x")
    assert supervisor.in_progress() == []
    supervisor.started("x", "engine", None)
    assert supervisor.begin("x", [A]) == {A: 1}


def test_deaths_alone_are_counted_apart() -> None:
    supervisor = Supervisor()
    supervisor.started("x", "engine", None)
    supervisor.begin("x", [A])
    for lone_deaths in (0, 1, 2):
        supervisor.started("x", "engine", None)
        assert supervisor.begin("x", [A]) == {A: lone_deaths}
        supervisor.begin_alone("x", A)


def test_a_row_that_ends_well_alone_leaves_nothing_open() -> None:
    supervisor = Supervisor()
    supervisor.started("x", "engine", None)
    supervisor.begin_alone("x", A)
    supervisor.end("x", [A])
    assert supervisor.in_progress() == []


def test_the_oldest_row_of_each_actor_is_told() -> None:
    supervisor = Supervisor()
    supervisor.started("x", "engine", "handle")
    supervisor.begin("x", [A])
    time.sleep(0.01)
    supervisor.begin("x", [B])
    ((who, kind, handle, place, age, still),) = supervisor.in_progress()
    assert (who, kind, handle, place) == ("x", "engine", "handle", A)
    assert age == still > 0  # that it was given another row is no sign of life


def test_an_actor_whose_figures_change_or_whose_rows_end_has_not_stood_still() -> None:
    supervisor = Supervisor()
    supervisor.started("x", "engine", None)
    supervisor.begin("x", [A, B])

    def stood_still_after(*what: Any) -> float:
        time.sleep(0.05)
        before = time.monotonic()
        getattr(supervisor, what[0])("x", *what[1:])
        (*_, age, still) = supervisor.in_progress()[0]
        assert age >= 0.05
        return float(still - (time.monotonic() - before))

    assert stood_still_after("report", {"passes": 1.0}) < 0.01
    assert stood_still_after("report", {"passes": 2.0}) < 0.01
    assert stood_still_after("report", {"passes": 2.0}) >= 0.05
    assert stood_still_after("begin", [C]) >= 0.1
    assert stood_still_after("end", [B]) < 0.01


def test_one_alone_has_nobody_beside_it_and_does_not_starve() -> None:
    lock, inside, seen = ReadWriteLock(), [0], []
    counting = threading.Lock()

    def enter(lone: bool) -> None:
        with lock.alone() if lone else lock.together():
            with counting:
                inside[0] += 1
            time.sleep(0.002)
            if lone:
                seen.append(inside[0])
            with counting:
                inside[0] -= 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(enter, [number % 10 == 5 for number in range(100)]))
    assert seen == [1] * 10


def test_work_begins_with_the_first_row_once_an_engine_is_up() -> None:
    supervisor = Supervisor()
    assert supervisor.seconds_up() == 0.0
    supervisor.started("p", "preprocess", None)
    supervisor.begin("p", [A])
    assert supervisor.seconds_up() == 0.0
    time.sleep(0.05)
    born = time.monotonic()
    supervisor.started("e", "engine", None)
    assert 0.0 <= supervisor.seconds_up() <= time.monotonic() - born


def test_how_a_unit_left_is_forgotten_once_all_its_rows_have_arrived() -> None:
    supervisor = Supervisor()
    work = [WorkUnit(0, "a", 0, 3), WorkUnit(0, "a", 3, 9, selected=np.array([3, 8])), WorkUnit(1, "b", 0, 1)]
    for unit in work:
        supervisor.hand_over((unit.file, unit.start), unit.rows)
    units = OpenUnits(work)
    assert units.arrived([]) == units.arrived([(0, 2), (0, 0), (0, 8)]) == []
    assert units.arrived([(1, 0), (0, 1)]) == [(1, 0), (0, 0)]
    supervisor.forget([(1, 0), (0, 0), (5, 5)])
    assert supervisor.handed_over((0, 0)) == supervisor.handed_over((1, 0)) == []
    assert [rows.tolist() for rows in supervisor.handed_over((0, 3))] == [[3, 8]]
    assert units.arrived([(0, 3)]) == [(0, 3)]
