"""A limit on a pass that out-of-memory errors lower and that grows back afterwards."""

from __future__ import annotations

MAX_WAIT = 1024


class Limit:
    """Halved when a pass runs out of memory, and doubled after `wait` passes that did not.

    Unless it grows back at once (wait 1), each failure doubles the wait: where the full limit can never be reached,
    failures become rare.
    """

    def __init__(self, full: int, *, smallest: int = 1, wait: int = 32) -> None:
        self.value = self.full = full
        self._smallest = min(smallest, full)
        self._wait = self._left = wait

    def halve(self, used: int | None = None) -> None:
        """Out of memory, with a pass of `used` where it was smaller than the limit."""
        self.value = max(self._smallest, min(self.value, used or self.value) // 2)
        if self._wait > 1:
            self._wait = min(2 * self._wait, MAX_WAIT)
        self._left = self._wait

    def succeeded(self) -> None:
        """A pass within the limit had enough memory."""
        if self.value == self.full:
            return
        self._left -= 1
        if self._left == 0:
            self.value = min(self.full, 2 * self.value)
            self._left = self._wait
