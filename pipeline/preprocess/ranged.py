"""A medium as a file of which only what is asked for is read: for headers of large files in buckets and on the web.

Knows positions, bytes and a time limit; not places (`fetch.py`) or formats.
"""

from __future__ import annotations

import io
import time

from pipeline.errors import FetchError, FetchTimeout, MediaTimeout, RowError, UnsupportedMedia
from pipeline.preprocess.fetch import FIRST_BYTES, RangedSource
from pipeline.preprocess.limits import MIB

_LONGEST_READ = MIB
MOST_BYTES = 64 * MIB
"""A header that takes more than this is none."""


class RangedFile(io.RawIOBase):
    """Reads in blocks that grow while the reader goes straight on, and keeps them.

    Also looks like the file's bytes, with a length and slices. A fault of the source ends every later read too, and
    stays in `fault`: parsers written in C take a failing read for the end of the file.
    """

    def __init__(self, source: RangedSource, *, seconds: float) -> None:
        """`seconds` is the time for everything read through this file."""
        self._source = source
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._position = 0
        self._parts: dict[int, bytes] = {0: source.first} if source.first else {}
        self._next = len(source.first) or -1
        """Where the last read of the source ended."""
        self._length = FIRST_BYTES
        self.bytes_read = len(source.first)
        """Bytes that came from the source."""
        self.fault: RowError | None = None
        """What ended the reading."""

    def __len__(self) -> int:
        return self._source.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._source.size)
        return self._span(start, max(start, stop))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        size = self._source.size if size is None or size < 0 else size
        part = self._span(self._position, min(self._position + size, self._source.size))
        self._position += len(part)
        return part

    def _span(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), from parts that were read before as far as they reach."""
        pieces: list[bytes] = []
        while start < stop:
            begin = max((at for at in self._parts if at <= start < at + len(self._parts[at])), default=None)
            if begin is None:
                begin = self._fetch(start, stop)
            piece = self._parts[begin][start - begin : stop - begin]
            pieces.append(piece)
            start += len(piece)
        return b"".join(pieces)

    def _fetch(self, start: int, stop: int) -> int:
        """Read a part that begins at `start`; says where it begins."""
        self._check()
        self._length = min(2 * self._length, _LONGEST_READ) if start == self._next else FIRST_BYTES
        # Not past what is there already.
        known = min((at for at in self._parts if at > start), default=self._source.size)
        end = min(max(stop, start + self._length), known, self._source.size)
        try:
            data = self._source.read(start, end)
            if not data:
                raise FetchError(f"the source ends at byte {start:,} of {self._source.size:,}")
        except RowError as error:
            self.fault = error
            raise
        self.bytes_read += len(data)
        self._parts[start], self._next = data, start + len(data)
        self._check()
        return start

    def _check(self) -> None:
        if self.fault is not None:
            raise self.fault
        if time.monotonic() > self._deadline:
            kind = FetchTimeout if self.bytes_read < MIB else MediaTimeout
            self.fault = kind(f"the header was not read within {self._seconds:g} s ({self.bytes_read:,} bytes read)")
        elif self.bytes_read > MOST_BYTES:
            self.fault = UnsupportedMedia(f"the header takes more than {MOST_BYTES // MIB} MiB to read")
        if self.fault is not None:
            raise self.fault
