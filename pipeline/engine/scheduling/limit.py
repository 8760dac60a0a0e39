"""A limit on a pass that out-of-memory errors lower and that grows back afterwards."""

from __future__ import annotations

MAX_WAIT = 1024


class Limit:
    """Halved when a pass runs out of memory, and doubled after `wait` passes that came near it and did not.

    Unless it grows back at once (wait 1), growth that ends in a failure doubles the wait: where the full limit can
    never be reached, failures become rare. A failure after many passes near the same value has another cause than the
    value, and the wait returns to what it was at first; otherwise a few such failures would leave a long job with small
    passes.
    """

    def __init__(self, full: int, *, smallest: int = 1, wait: int = 32) -> None:
        self.value = self.full = full
        self._smallest = min(smallest, full)
        self._first_wait = self._wait = wait
        self._passes = 0
        """That came near the value since it last changed."""
        self._has_grown = False
        """Whether it was doubled last, not halved."""

    def halve(self, used: int | None = None) -> None:
        """Out of memory, with a pass of `used` where it was smaller than the limit."""
        self.value = max(self._smallest, min(self.value, used or self.value) // 2)
        if self._first_wait > 1 and self._has_grown and self._passes < self._wait:
            self._wait = min(2 * self._wait, MAX_WAIT)
        elif self._passes >= self._first_wait:
            self._wait = self._first_wait
        self._passes, self._has_grown = 0, False

    def succeeded(self, used: int) -> None:
        """A pass of this size had enough memory. One of less than half the limit says nothing about it."""
        if 2 * used < self.value:
            return
        self._passes += 1
        if self.value < self.full and self._passes >= self._wait:
            self.value = min(self.full, 2 * self.value)
            self._passes, self._has_grown = 0, True
