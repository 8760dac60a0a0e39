"""When to look for actors that stand still: often enough to find one of many, and whenever no row finishes at all.

Knows the clock; not actors, nor how one is found and killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

_LOOKS_PER_TIMEOUT = 10


class BreakStall(Protocol):
    """Kills what has stood still for so many seconds; says what every actor does, always or where one was killed."""

    def __call__(self, seconds: float, *, tell: bool) -> Sequence[str]: ...


class Watchdog:
    """Told every second or so whether a row has finished; gives the lines to show."""

    def __init__(self, timeout_s: float, break_stall: BreakStall, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s, self._break_stall, self._clock = timeout_s, break_stall, clock
        self._last_row = self._last_look = clock()

    def look(self, *, finished_row: bool) -> list[str]:
        """What was found, if it was time to look: nothing, or a headline and a line for each actor."""
        now = self._clock()
        if finished_row:
            self._last_row = now
        nothing_finishes = now - self._last_row >= self._timeout_s
        if not nothing_finishes and now - self._last_look < self._timeout_s / _LOOKS_PER_TIMEOUT:
            return []
        self._last_look = now
        told = self._break_stall(self._timeout_s, tell=nothing_finishes)
        if not told:
            return []
        headline = f"an actor has stood still for {self._timeout_s:.0f} s:"
        if nothing_finishes:
            self._last_row = now
            headline = f"no row has finished for {self._timeout_s:.0f} s:"
        return [headline, *(f"  {line}" for line in told)]
