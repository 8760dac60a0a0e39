"""A decoded frame to RGB pixels as a player shows them: turned by the display matrix, on white, in standard range.

FFmpeg leaves all three to the player. Knows frames; not which ones are shown, nor how they were decoded.
"""

from __future__ import annotations

from functools import lru_cache

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.preprocess.image import on_white
from pipeline.preprocess.video.hdr import TRANSFERS, standard_range


def rgb_pixels(frame: av.VideoFrame) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """(RGB pixels [H, W, 3], what was done that other software may do otherwise)."""
    notes: list[str] = []
    if has_alpha(frame.format.name):
        pixels = np.asarray(on_white(Image.fromarray(_array(frame, "rgba"))))
    elif frame.color_trc in TRANSFERS:
        pixels = standard_range(frame)
        notes.append(f"HDR ({TRANSFERS[frame.color_trc]}) shown in standard range: highlights are compressed")
    else:
        pixels = _array(frame, "rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return (pixels, notes) if matrix is None else (_turned(pixels, np.frombuffer(matrix, np.int32), notes), notes)


def _array(frame: av.VideoFrame, pixel_format: str) -> npt.NDArray[np.uint8]:
    pixels: npt.NDArray[np.uint8] = frame.to_ndarray(format=pixel_format)
    return pixels


@lru_cache(maxsize=64)
def has_alpha(pixel_format: str) -> bool:
    """Whether frames of a pixel format may be transparent."""
    return pixel_format == "pal8" or any(part.is_alpha for part in av.VideoFormat(pixel_format).components)


def _turned(pixels: npt.NDArray[np.uint8], matrix: npt.NDArray[np.int32], notes: list[str]) -> npt.NDArray[np.uint8]:
    """By the linear part of a display matrix: (x, y) goes to (a x + c y, b x + d y)."""
    a, b, _, c, d = (int(value) for value in matrix[:5])
    across, down, others = a, d, (b, c)
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = pixels.transpose(1, 0, 2)
        across, down, others = c, b, (a, d)
    if any(others) or abs(across) != abs(down):
        found = ", ".join(f"{value / 65536:.3g}" for value in (a, b, c, d))
        notes.append(f"the display matrix ({found}) is no turn by right angles or flip: the nearest of those is shown")
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])
