"""Fetches that run ahead of decoding: rows whose media are here pass rows whose media are slow.

A slow fetch holds up its own row only. Up to `ahead` media of rows that nobody has passed yet are under way, as many as
keep a decoder busy where servers answer fast; rows that were passed do not count, so that more and more fetches are
under way where some hang, up to `at_most`, or to so many bytes. Knows futures and sizes; not what a fetch does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, Protocol, TypeVar

from pipeline.conversation import Source

_MAX_BYTES = 512 << 20
"""Media that are fetched, or being fetched, ahead of their turn take about this much memory at most."""

_SLOW_S = 0.5
"""Seconds after which fetches count as slow, where nobody waits for finished rows."""


class FetchPool:
    """The fetching threads of one actor, and how many media they have ahead of decoding. Its units share it."""

    def __init__(self, fetch: Callable[[Source], bytes], *, ahead: int, at_most: int) -> None:
        self.ahead = ahead
        self.waited_s = 0.0
        """Seconds in which all units that had work waited for fetches."""
        self._fetch = fetch
        self._at_most = at_most
        self._threads = ThreadPoolExecutor(at_most, thread_name_prefix="fetch")
        self._lock = threading.Lock()
        self._num_ahead = 0
        self._mean_bytes = 0.0
        self._num_units = self._num_waiting = 0
        self._counted = time.perf_counter()

    def submit(self, source: Source) -> Future[bytes]:
        """Fetch a medium, in a thread unless it is here."""
        if isinstance(source, bytes):
            fetched: Future[bytes] = Future()
            try:
                fetched.set_result(self._fetch(source))
            except BaseException as error:
                fetched.set_exception(error)
        else:
            fetched = self._threads.submit(self._fetch, source)
        with self._lock:
            self._num_ahead += 1
        fetched.add_done_callback(self._measure)
        return fetched

    def _measure(self, fetched: Future[bytes]) -> None:
        if not fetched.cancelled() and fetched.exception() is None:
            size = len(fetched.result())
            with self._lock:
                self._mean_bytes += (size - self._mean_bytes) / 8 if self._mean_bytes else size

    def release(self, fetches: list[Future[bytes]]) -> None:
        """The media of a row are no longer needed."""
        for fetched in fetches:
            fetched.cancel()
        with self._lock:
            self._num_ahead -= len(fetches)

    @property
    def has_room(self) -> bool:
        """Whether more may be fetched ahead."""
        with self._lock:
            few = self._num_ahead < self.ahead
            return few or (self._num_ahead < self._at_most and self._num_ahead * self._mean_bytes < _MAX_BYTES)

    def count(self, *, units: int = 0, waiting: int = 0) -> None:
        """Units began or ended work, or began or ended to wait for a fetch."""
        with self._lock:
            now = time.perf_counter()
            if self._num_units and self._num_units == self._num_waiting:
                self.waited_s += now - self._counted
            self._counted = now
            self._num_units += units
            self._num_waiting += waiting

    def close(self) -> None:
        """Begin no more fetches."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Fetching(Protocol):
    """A row whose media are being fetched."""

    fetches: list[Future[bytes]]
    """None once they have been released."""


Row = TypeVar("Row", bound=Fetching)


class FetchAhead(Generic[Row]):
    """The rows of one unit, from the moment that their fetches begin until they are taken."""

    def __init__(self, pool: FetchPool, rows: Iterator[Row], when_begun: Callable[[], object]) -> None:
        """`rows` begins a row's fetches when it is asked for the row; `when_begun` is called when all have begun."""
        self._pool, self._rows, self._when_begun = pool, rows, when_begun
        self._under_way: dict[int, Row] = {}
        """By place in the unit."""
        self._taken: list[tuple[int, Row]] = []
        """What was taken last, whose media may still be needed."""
        self._num_begun, self._passed = 0, -1
        self._all_begun = False

    def take(self, most: int, *, patience_s: float | None = None) -> list[tuple[int, Row]] | None:
        """Up to so many rows whose media are here, with their places, the earliest first; empty after the last.

        Waits for a row. If none gets ready for `patience_s` and no further row may begin, it returns None.
        """
        self._begin()
        while self._under_way:
            # In this order: a fetch that ends between the two lists wakes the wait at once.
            pending = [one for row in self._under_way.values() for one in row.fetches if not one.done()]
            ready = [place for place, row in self._under_way.items() if all(one.done() for one in row.fetches)]
            if ready:
                self._taken = [(place, self._under_way.pop(place)) for place in sorted(ready)[:most]]
                self._passed = max(self._passed, self._taken[-1][0])
                return self._taken
            self._pool.count(waiting=1)
            done, _ = wait(pending, _SLOW_S if patience_s is None else patience_s, FIRST_COMPLETED)
            self._pool.count(waiting=-1)
            num_begun = self._num_begun
            if not done:
                self._passed = num_begun - 1  # all that are under way are slow: others need not wait behind them
            self._begin()
            if not done and patience_s is not None and self._num_begun == num_begun:
                return None
        return []

    def _begin(self) -> None:
        """Begin as many rows as may be under way."""
        while not self._all_begun and self._may_begin():
            row = next(self._rows, None)
            if row is None:
                self._all_begun = True
                self._when_begun()
                return
            self._under_way[self._num_begun] = row
            self._num_begun += 1

    def _may_begin(self) -> bool:
        fresh = sum(max(1, len(row.fetches)) for place, row in self._under_way.items() if place > self._passed)
        return not self._under_way or (fresh < self._pool.ahead and self._pool.has_room)

    def close(self) -> None:
        """Give up the rows that were not taken, and those taken whose media nobody has released."""
        for row in (*self._under_way.values(), *(row for _, row in self._taken)):
            self._pool.release(row.fetches)
        self._under_way.clear()
