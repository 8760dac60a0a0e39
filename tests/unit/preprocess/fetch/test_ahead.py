"""Rows pass those whose fetches are slow, however many of these there are."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest

from pipeline.preprocess.fetch import ahead
from pipeline.preprocess.fetch.ahead import FetchAhead, FetchPool


@dataclass
class Row:
    fetches: list[Future[bytes]] = field(default_factory=list)


def rows_of(pool: FetchPool, sources: list[str]) -> Iterator[Row]:
    return (Row([pool.submit(source)]) for source in sources)


def test_rows_behind_as_many_slow_ones_as_run_ahead_are_begun_and_taken() -> None:
    released = threading.Event()

    def fetch(source: Any) -> bytes:
        if source == "slow":
            released.wait(60)
        return b"x"

    pool = FetchPool(fetch, ahead=4, at_most=16)
    rows = FetchAhead(pool, rows_of(pool, ["slow"] * 4 + ["fast"] * 3), lambda: None)
    taken: list[int] = []
    while len(taken) < 3:
        taken += [place for place, _ in rows.take(3, patience_s=0.05) or []]
    assert sorted(taken) == [4, 5, 6]
    assert rows.take(3, patience_s=0.05) is None, "finished rows need not wait for the slow ones"
    released.set()
    assert {place for place, _ in rows.take(4) or []} <= {0, 1, 2, 3}
    rows.close()
    pool.close()


def test_a_fetch_that_ends_while_the_rows_are_looked_at_is_not_waited_for() -> None:
    class EndsWhenLookedAt(Future[bytes]):
        """Ends after it was first asked whether it has ended."""

        def done(self) -> bool:
            ended = super().done()
            if not ended:
                self.set_result(b"x")
            return ended

    hung: Future[bytes] = Future()
    pool = FetchPool(lambda source: b"", ahead=4, at_most=4)
    rows = FetchAhead(pool, iter([Row([EndsWhenLookedAt()]), Row([hung])]), lambda: None)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(rows.take(2)), daemon=True)
    thread.start()
    thread.join(30)
    assert [place for place, _ in found[0]] == [0]
    pool.close()


def test_a_unit_that_ends_early_gives_back_what_its_taken_rows_hold() -> None:
    pool = FetchPool(lambda source: b"x", ahead=2, at_most=2)
    rows = FetchAhead(pool, (Row([pool.submit(b"here")]) for _ in range(3)), lambda: None)
    taken = rows.take(2) or []
    assert len(taken) == 2 and not pool.has_room
    pool.release(taken[0][1].fetches)
    taken[0][1].fetches = []
    rows.close()
    assert pool._num_ahead == 0
    pool.close()


def test_a_fetch_that_cannot_be_begun_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = FetchPool(lambda source: b"x", ahead=1, at_most=1)

    def no_thread(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pool._threads, "submit", no_thread)
    with pytest.raises(RuntimeError):
        pool.submit("a.jpg")
    assert pool.has_room
    pool.close()


def test_rows_behind_slow_ones_begin_while_a_finished_row_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_SLOW_S", 0.01)
    released = threading.Event()

    def fetch(source: Any) -> bytes:
        return b"x" if source == "fast" or released.wait(60) else b""

    pool = FetchPool(fetch, ahead=1, at_most=2)
    rows = FetchAhead(pool, rows_of(pool, ["slow", "fast"]), lambda: None)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(rows.take(1)), daemon=True)
    thread.start()
    thread.join(20)
    released.set()
    assert found and [place for place, _ in found[0]] == [1]
    pool.close()


def test_a_pool_closes_while_a_fetch_hangs() -> None:
    released = threading.Event()
    pool = FetchPool(lambda source: b"x" if released.wait(60) else b"", ahead=1, at_most=1)
    hung, queued = pool.submit("a"), pool.submit("b")
    thread = threading.Thread(target=pool.close, daemon=True)
    thread.start()
    thread.join(20)
    closed = not thread.is_alive()
    released.set()
    assert closed and queued.cancelled() and hung.result() == b"x"


def test_the_time_in_which_every_working_unit_waits_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pool = FetchPool(lambda source: b"", ahead=1, at_most=1)
    for seconds, change in [
        (1, {"units": 1}), (2, {"waiting": 1}), (4, {"units": 1}), (8, {"waiting": 1}),
        (16, {"waiting": -1}), (32, {"waiting": -1}), (64, {"units": -2}), (128, {}),
    ]:  # fmt: skip
        now[0] += seconds
        pool.count(**change)
    assert pool.waited_s == 4 + 16
    pool.close()
