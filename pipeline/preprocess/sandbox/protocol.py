"""What the actor and its decoder say to each other; encoded media and patches travel through shared memory instead.

Requests are pickled. Answers are JSON, because a decoder that a hostile file has taken over must not be able to run
code in the actor. Knows no processes and no codecs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.preprocess.sandbox.shared_memory import Segment

_CLOCK_BITS = 44
"""Bits of the progress that hold milliseconds, enough for 500 years; the number of the medium is above them."""
PROGRESS_BYTES = 64
"""The input segment begins with the decoder's progress; the media follow."""


class StoredMedium(NamedTuple):
    """A medium whose encoded bytes lie in the input segment."""

    kind: MediumKind
    settings: MediumSettings
    offset: int
    size: int


class DecodeRequest(NamedTuple):
    """Media to decode. The decoder answers each, in order."""

    groups: list[list[StoredMedium]]
    """Media of one group share the budget `max_visual_tokens`."""
    output: int
    """Number of the output segment to write to."""
    thumbnails: int | None
    """The longest side in pixels, if thumbnails are wanted instead of patches."""


class Answer(TypedDict, total=False):
    """What became of one medium: an error, or patches with their receipt, or thumbnails."""

    error: tuple[str, str]
    """(name of the class in pipeline.errors, message)"""
    patches: tuple[int, int, int]
    """(offset in the output segment, number of patches, bytes of a patch)"""
    receipt: dict[str, Any]
    """The fields of a MediumReceipt; `source` is empty."""
    prompt_seconds: list[float]
    """As in SeenMedium. JSON keeps every bit of a float."""
    seconds_per_step: float
    thumbnails: list[tuple[int, int]]
    """(offset in the output segment, size) of each JPEG."""


def write_progress(segment: Segment, number: int, started: float) -> None:
    """Store which medium of the request is being decoded, and since when on the machine's monotonic clock.

    So the actor can tell which medium hangs or crashed the decoder without a message for each. Both are one aligned
    word, which is stored at once: the actor reads while the decoder writes, and the decoder may lose its core between
    two stores. (`struct.pack_into` is no such store: it clears the bytes first.)
    """
    with memoryview(segment.map)[:8] as first, first.cast("Q") as word:
        word[0] = number << _CLOCK_BITS | int(started * 1000)


def read_progress(segment: Segment) -> tuple[int, float]:
    """(number, started) as last written, `started` to the millisecond."""
    with memoryview(segment.map)[:8] as first, first.cast("Q") as word:
        value = word[0]
    return value >> _CLOCK_BITS, (value & (1 << _CLOCK_BITS) - 1) / 1000
