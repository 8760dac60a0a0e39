"""An encoded medium to small JPEGs for people to look at.

Runs in the decoder process, since media are strangers' files. Knows Pillow; not pages, processes or the model's sizes.
"""

from __future__ import annotations

import io
from dataclasses import replace

from PIL import Image

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.preprocess.image import OpenImage
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.video.frames import OpenVideo

_NUM_FRAMES = 4
"""Of a video that has as many; an even number."""
_JPEG_QUALITY = 72


def encode_thumbnails(
    kind: MediumKind, data: bytes | memoryview, options: MediaOptions, *, max_side: int
) -> list[bytes]:
    """JPEGs of at most `max_side` pixels: one of an image, up to four of a video.

    Raises MediaError subclasses.
    """
    if kind == "image":
        # A JPEG is decoded at a reduced size; twice the side leaves something to be averaged.
        return [_jpeg(Image.fromarray(OpenImage(data, options).decode(min_side=2 * max_side)), max_side)]
    video = OpenVideo(data, MediumSettings(), replace(options, num_frames=_NUM_FRAMES, video_frames="exact"))
    return [_jpeg(Image.fromarray(pixels), max_side) for _, pixels in video.frames()]


def _jpeg(image: Image.Image, max_side: int) -> bytes:
    image.thumbnail((max_side, max_side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return file.getvalue()
