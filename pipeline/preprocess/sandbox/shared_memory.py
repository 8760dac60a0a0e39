"""Memory that two processes share, as an anonymous file that both have open.

Not `multiprocessing.shared_memory`: that lives in /dev/shm, which containers keep small, and outlives a killed process.
Knows bytes only.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile

_GRANULARITY = 1024 * 1024


class Segment:
    """Memory behind a file descriptor. Either side may resize it; the other then calls `refresh`."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None
        self.size = 0
        """Bytes that can be used."""
        self.refresh()

    @classmethod
    def create(cls) -> Segment:
        """A new, empty segment."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("media", os.MFD_CLOEXEC))
        with tempfile.TemporaryFile() as file:  # macOS
            return cls(os.dup(file.fileno()))

    @property
    def map(self) -> mmap.mmap:
        """The memory; valid until the size changes."""
        assert self._map is not None, "an empty segment has no memory"
        return self._map

    def reserve(self, size: int) -> None:
        """Grow to at least `size` bytes; the contents stay."""
        if size > self.size:
            os.ftruncate(self.descriptor, -(-size // _GRANULARITY) * _GRANULARITY)
            self.refresh()

    def trim(self, size: int) -> None:
        """Free the memory past `size` bytes, which no array may use."""
        if self.size > size:
            self._unmap()
            os.ftruncate(self.descriptor, size)
            self.refresh()

    def refresh(self) -> None:
        """Follow a change of size by the other side."""
        size = os.fstat(self.descriptor).st_size
        if size != self.size or (size and self._map is None):
            self._unmap()
            self._map = mmap.mmap(self.descriptor, size) if size else None
            self.size = size

    def close(self) -> None:
        """Release the memory, as soon as no array uses it."""
        self._unmap()
        os.close(self.descriptor)

    def _unmap(self) -> None:
        if self._map is not None:
            with contextlib.suppress(BufferError):  # an array still uses it: the last one frees it
                self._map.close()
        self._map, self.size = None, 0
