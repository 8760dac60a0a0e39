"""A video that its row gives as a list of pictures: several files as one medium, from fetching to decoding.

Knows bytes; not pictures (video/listed.py) or where they come from.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_MAGIC = b"\x00list of frames\x00"
_HEAD = struct.Struct("<Q")


def pack_frames(frames: Sequence[bytes]) -> bytes:
    """The encoded pictures as one medium."""
    sizes = [_HEAD.pack(len(frame)) for frame in frames]
    return b"".join([_MAGIC, _HEAD.pack(len(frames)), *sizes, *frames])


def unpack_frames(data: bytes | memoryview) -> list[memoryview] | None:
    """The encoded pictures of `pack_frames`; None for any other medium."""
    view = memoryview(data)
    if bytes(view[: len(_MAGIC)]) != _MAGIC:
        return None
    (count,) = _HEAD.unpack_from(view, len(_MAGIC))
    at = len(_MAGIC) + _HEAD.size * (1 + count)
    frames = []
    for number in range(count):
        (size,) = _HEAD.unpack_from(view, len(_MAGIC) + _HEAD.size * (1 + number))
        frames.append(view[at : at + size])
        at += size
    return frames
