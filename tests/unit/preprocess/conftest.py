"""Small real media, made as the tests ask for them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from pipeline.conversation import MediumSettings
from pipeline.preprocess.image import OpenImage
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.sandbox.client import MediaWorker
from pipeline.preprocess.video.frames import OpenVideo
from tests.options import media_options

_DEFAULTS = media_options()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def encode_image(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int, height: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """RGB pixels [height, width, 3]: slopes, stripes and some noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [
        (rows * (2 + channel) + columns * (3 - channel) + 80 * ((columns // 9) % 2) + rng.integers(0, 20, rows.shape))
        for channel in range(3)
    ]
    return (np.stack(planes, axis=-1) % 256).astype(np.uint8)


def encode_video(
    frames: npt.NDArray[np.uint8] | int = 30,
    *,
    size: tuple[int, int] = (96, 64),
    rate: int | Fraction = 10,
    codec: str = "libx264",
    container: str = "mp4",
    times: list[int] | None = None,
    time_base: Fraction | None = None,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    rotation: int | None = None,
    matrix: list[int] | None = None,
    color: dict[str, int] | None = None,
    container_options: dict[str, str] | None = None,
) -> bytes:
    """A clip of numbered grey levels (frame n has level 5 n + 10) or of the given frames, as a file's bytes.

    `color` are numbers of ITU-T H.273 by the names of FFmpeg's fields.
    """
    width, height = size
    if isinstance(frames, int):
        frames = np.stack([np.full((height, width, 3), min(250, 5 * n + 10), dtype=np.uint8) for n in range(frames)])
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=container_options or {}) as target:
        stream: Any = target.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if time_base is not None:
            stream.codec_context.time_base = time_base
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for name, value in (color or {}).items():
            setattr(stream.codec_context, name, value)
        for number, pixels in enumerate(frames):
            form = "rgba" if pixels.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(pixels, format=form).reformat(format=pix_fmt)
            for name, value in (color or {}).items():
                setattr(frame, name, value)
            if times is not None:
                assert time_base is not None
                frame.pts, frame.time_base = times[number], time_base
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return file.getvalue()


def decode_image(data: bytes, options: MediaOptions = _DEFAULTS) -> npt.NDArray[np.uint8]:
    """RGB pixels [H, W, 3]."""
    return OpenImage(data, options).decode()


class VideoFrames(NamedTuple):
    """All sampled frames of a video."""

    frames: npt.NDArray[np.uint8]
    """[T, H, W, 3], RGB."""
    timestamps: tuple[float, ...]
    note: str | None


def decode_video(data: bytes, settings: MediumSettings, options: MediaOptions = _DEFAULTS) -> VideoFrames:
    """The sampled frames, all at once."""
    video = OpenVideo(data, settings, options)
    timestamps, frames = zip(*video.frames(), strict=True)
    return VideoFrames(np.stack(frames), timestamps, video.note)


def level(pixels: npt.NDArray[np.uint8]) -> int:
    """Number of the frame that `encode_video` drew in this grey."""
    return round((float(pixels.mean()) - 10) / 5)


@pytest.fixture(scope="module")
def worker() -> Iterator[MediaWorker]:
    """One decoder process for a module's tests."""
    with MediaWorker(media_options()) as shared:
        yield shared
