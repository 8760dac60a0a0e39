"""Frames to short H.264 files and back.

Knows codecs; not scenes or questions.
"""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from pipeline.preprocess.patches import Uint8Array

# A reformatter keeps its scaler from frame to frame; making one for each frame costs four times as much.
_TO_YUV, _TO_RGB = VideoReformatter(), VideoReformatter()


def encode_clip(frames: Uint8Array, fps: int) -> bytes:
    """An MP4 file of RGB frames [T, height, width, 3]: H.264, chroma halved (yuv420p), a few kilobytes."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # cpu-independent: without it, x264's rate control reads memory that it has not written, and the same frames
        # give different bytes from time to time.
        options = {"crf": "18", "preset": "veryfast", "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # the same bytes for any number of cores
        for frame in frames:
            container.mux(stream.encode(_yuv(frame)))
        container.mux(stream.encode(None))
    return file.getvalue()


def decode_clip(data: bytes, frames: list[int]) -> Uint8Array:
    """The frames asked for (rising indices) of an encoded clip, RGB [T, height, width, 3]."""
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_count = 1
        decoded = list(container.decode(video=0))
    return np.stack([_rgb(decoded[index]) for index in frames])


def halve_chroma(frames: Uint8Array) -> Uint8Array:
    """RGB frames with colours averaged over 2 x 2 pixels, as yuv420p has them: most of what the codec does to them."""
    return np.stack([_halve_chroma(Image.fromarray(frame)) for frame in frames])


def _halve_chroma(frame: Image.Image) -> Uint8Array:
    light, *colours = frame.convert("YCbCr").split()
    coarse = [colour.reduce(2).resize(frame.size, Image.Resampling.NEAREST) for colour in colours]
    return np.asarray(Image.merge("YCbCr", [light, *coarse]).convert("RGB"))


def sampled_frames(num_frames: int, fps: float, *, sample_fps: float = 2.0, min_frames: int = 4) -> list[int]:
    """The frames that the job samples: transformers' rule at `sample_fps`, an even number of them."""
    wanted = min(max(num_frames / fps * sample_fps, min_frames), num_frames)
    count = int(wanted // 2 * 2)
    return [int(index * num_frames / count) for index in range(count)]


def _yuv(frame: Uint8Array) -> Any:
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return _TO_YUV.reformat(picture, format="yuv420p")


def _rgb(frame: Any) -> Uint8Array:
    return np.asarray(_TO_RGB.reformat(frame, format="rgb24").to_ndarray(), dtype=np.uint8)
