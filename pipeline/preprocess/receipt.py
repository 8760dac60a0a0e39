"""What becomes of a medium: its patches and its receipt.

Apart from the codecs that make it, which only the decoder's process needs to load.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.conversation import Source
from pipeline.schema import MediumReceipt

_SHOWN_DATA_URI = 40


@dataclass(frozen=True)
class SeenMedium:
    """What the model gets of one medium."""

    patches: npt.NDArray[np.uint8]
    """[patches, bytes]: 588 bytes for an image of patches of 14 pixels, whose two temporal halves are equal, and 1,176
    for a video; 768 and 1,536 of 16 pixels."""
    receipt: MediumReceipt
    prompt_seconds: tuple[float, ...] = ()
    """Of a video, the time of each temporal step, unrounded, where the family's prompts give it."""
    seconds_per_step: float = 1.0
    """Of a video, between temporal steps: some families' positions count it."""


def source_name(source: Source) -> str:
    """What a medium's source is called: its URI, `bytes`, or the first of a list of frames and their number."""
    if isinstance(source, tuple):
        return f"{len(source)} frames: {shown_source(source_name(source[0]))}"
    return source if isinstance(source, str) else "bytes"


def shown_source(source: str) -> str:
    """A source as receipts show it: the URI, but of a data: URI, which is the medium itself, only its beginning."""
    if not source.startswith("data:") or len(source) <= _SHOWN_DATA_URI:
        return source
    return f"{source[:_SHOWN_DATA_URI]}... ({len(source):,} characters)"
