"""A piece of memory that two processes see, as an anonymous file.

Not `multiprocessing.shared_memory`: that lives in /dev/shm, which containers keep small, and outlives a killed
process. Knows bytes only.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile

_GRAIN = 1024 * 1024


class Segment:
    """Memory behind a file descriptor; either side may make it larger, the other then calls `refresh`."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None
        self._size = 0
        self.refresh()

    @classmethod
    def create(cls) -> Segment:
        """A new, empty segment."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("media", os.MFD_CLOEXEC))
        with tempfile.TemporaryFile() as file:  # macOS
            return cls(os.dup(file.fileno()))

    @property
    def size(self) -> int:
        """Bytes that can be used."""
        return self._size

    @property
    def map(self) -> mmap.mmap:
        """The memory; valid until the size changes."""
        assert self._map is not None, "an empty segment has no memory"
        return self._map

    def reserve(self, size: int) -> None:
        """Make room for at least so many bytes; what is there stays."""
        if size > self._size:
            os.ftruncate(self.descriptor, -(-size // _GRAIN) * _GRAIN)
            self.refresh()

    def trim(self, size: int) -> None:
        """Give back what lies past so many bytes. Nobody may be looking at it."""
        if self._size > size:
            self._unmap()
            os.ftruncate(self.descriptor, size)
            self.refresh()

    def refresh(self) -> None:
        """See the size that the other side may have changed."""
        size = os.fstat(self.descriptor).st_size
        if size != self._size or (size and self._map is None):
            self._unmap()
            self._map = mmap.mmap(self.descriptor, size) if size else None
            self._size = size

    def close(self) -> None:
        """Let go of the memory. Arrays that look at it keep it alive until they are gone."""
        self._unmap()
        os.close(self.descriptor)

    def _unmap(self) -> None:
        if self._map is not None:
            with contextlib.suppress(BufferError):  # an array still looks at it: the last one frees it
                self._map.close()
        self._map, self._size = None, 0
