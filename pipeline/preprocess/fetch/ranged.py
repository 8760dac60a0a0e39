"""A medium as a file of which only the parts that are asked for are read: for headers of large files.

Positions and the cache of blocks are fsspec's. Knows a time limit and a byte limit; not where a medium lies (source.py)
or what its format is.
"""

from __future__ import annotations

import time

from fsspec.spec import AbstractBufferedFile

from pipeline.errors import FetchError, FetchTimeout, MediaTimeout, UnsupportedMedia
from pipeline.preprocess.fetch.source import FIRST_BYTES, RangedSource
from pipeline.preprocess.limits import MIB

_MAX_HEADER_BYTES = 64 * MIB
_NUM_BLOCKS = 128


class RangedFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A binary file over a source. It can also be sliced and measured like `bytes`.

    Reading raises the source's errors, FetchTimeout or MediaTimeout, and UnsupportedMedia for a header above 64 MiB.
    """

    def __init__(self, source: RangedSource, *, seconds: float) -> None:
        """`seconds` is the time for everything read through this file."""
        self._source = source
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self.bytes_read = len(source.first)
        """Bytes that came from the source."""
        # The index of a long video is large: so are the blocks of a large file, for the sake of few reads.
        block_bytes = min(max(FIRST_BYTES, source.size // _NUM_BLOCKS), MIB)
        blocks = {"maxblocks": _MAX_HEADER_BYTES // block_bytes}
        super().__init__(
            None, "", block_size=block_bytes, cache_type="blockcache", cache_options=blocks, size=source.size
        )

    def __len__(self) -> int:
        return self._source.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._source.size)
        return bytes(self.cache._fetch(start, stop))

    def read_all(self) -> bytes:
        """The whole file by one read of the source."""
        return self._fetch_range(0, self._source.size)

    def _fetch_range(self, start: int, stop: int) -> bytes:
        stop = min(stop, self._source.size)
        if stop <= len(self._source.first):
            return self._source.first[start:stop]
        data = self._source.read(start, stop)
        self.bytes_read += len(data)
        if time.monotonic() > self._deadline:
            kind = FetchTimeout if self.bytes_read < MIB else MediaTimeout
            raise kind(f"the header was not read within {self._seconds:g} s ({self.bytes_read:,} bytes read)")
        if self.bytes_read > _MAX_HEADER_BYTES:
            raise UnsupportedMedia(f"the header takes more than {_MAX_HEADER_BYTES // MIB} MiB to read")
        if len(data) < stop - start:
            raise FetchError(f"the source ends at byte {start + len(data):,} of {self._source.size:,}")
        return data
