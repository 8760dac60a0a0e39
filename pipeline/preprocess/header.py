"""A medium's size, frames and tokens, learned from its header. Nothing is decoded.

    file --Pillow's or FFmpeg's header--> pixels, frames --the run's own rules--> shown size

An image's size is exact. A video's frames are counted by its index where that is complete (MP4, MOV, AVI), by its
packets where the file is small, and otherwise by its stated duration and rate, or by its beginning where it states
none. Damage past the header is not seen, nor that a stored picture is turned: turning swaps the sides and changes no
count.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import av
import av.logging
import numpy as np

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.errors import TruncatedMedia
from pipeline.preprocess.fetch.ranged import RangedFile
from pipeline.preprocess.image import OpenImage
from pipeline.preprocess.limits import MIB, MediaOptions
from pipeline.preprocess.size import ShownSize, pixel_bounds
from pipeline.preprocess.video.container import (
    check_duration,
    check_frame_size,
    check_num_frames,
    ffmpeg_errors,
    open_container,
    stated_rate,
    video_stream,
)
from pipeline.preprocess.video.frames import OpenVideo
from pipeline.preprocess.video.listed import check_listed
from pipeline.preprocess.video.stated import stated_seconds
from pipeline.preprocess.video.timing import (
    Timeline,
    constant_rate,
    nearest_keyframes,
    prompt_seconds,
)

# What FFmpeg writes of broken headers comes back as errors; its own lines would land in the plan's page.
av.logging.set_level(None)

_READ_BYTES = 64 * 1024
_COUNTED_BYTES = 8 * MIB
"""Videos without an index up to this size are read whole and their packets counted."""
_BEGINNING_BYTES, _BEGINNING_FRAMES = 2 * MIB, 8
"""How much is read of a file that does not say how long it is."""
_COMPLETE = 0.9
"""Share of the frames and of the duration that a complete index covers."""


@dataclass(frozen=True)
class MediumHeader:
    """A medium as its header has it."""

    kind: MediumKind
    width: int
    """Pixels as stored."""
    height: int
    size: ShownSize
    """What the model would see of it."""
    num_bytes: int
    """Bytes of the file."""
    num_decoded: int = 1
    """Frames that have to be decoded for those that are shown."""
    prompt_seconds: tuple[float, ...] = ()
    """Of a video, as in SeenMedium."""
    is_exact: bool = True
    """Whether the frames were counted, rather than computed from the stated duration and rate."""


def read_header(kind: MediumKind, file: RangedFile, settings: MediumSettings, options: MediaOptions) -> MediumHeader:
    """Raises MediaError subclasses, SettingError, and whatever reading the file raises."""
    pixel_bounds(kind, settings, options)  # refused before anything is read
    if kind == "video":
        return _video(file, settings, options)
    image = OpenImage(file, options)
    size = ShownSize(kind, image.height, image.width, 1, settings, options)
    return MediumHeader(kind, image.width, image.height, size, len(file))


def read_listed_header(
    first: RangedFile, num_frames: int, settings: MediumSettings, options: MediaOptions
) -> MediumHeader:
    """Of a video given as a list of pictures, by the first of them. Raises as `read_header`."""
    check_listed(num_frames, settings, options)
    image = OpenImage(first, options)
    size = ShownSize("video", image.height, image.width, num_frames, settings, options)
    fps, num_bytes = settings.fps or options.fps, len(first) * num_frames
    steps = prompt_seconds([number / fps for number in range(num_frames)], options.family)
    return MediumHeader("video", image.width, image.height, size, num_bytes, num_frames, steps)


def _video(file: RangedFile, settings: MediumSettings, options: MediaOptions) -> MediumHeader:
    with ffmpeg_errors(file), open_container(file, buffer_size=_READ_BYTES) as container:
        stream = video_stream(container)
        width, height = stream.codec_context.width, stream.codec_context.height
        check_frame_size(width, height, options)
        indexed = _indexed_frames(stream, settings, options)
        if indexed is None and len(file) <= _COUNTED_BYTES:
            return _counted(file, settings, options)
        timeline, keys = indexed or (_stated_frames(file, container, stream, settings, options), [])
    places = timeline.choose(settings, options).frames
    if options.video_frames == "keyframes" and keys:
        places = nearest_keyframes(places, keys, timeline.seconds)
    num_decoded = len(places) if options.video_frames == "keyframes" else _num_decoded(places, keys)
    size = ShownSize("video", height, width, len(places), settings, options)
    steps = prompt_seconds(list(map(timeline.counted_second, places)), options.family)
    return MediumHeader("video", width, height, size, len(file), num_decoded, steps, is_exact=indexed is not None)


def _indexed_frames(stream: Any, settings: MediumSettings, options: MediaOptions) -> tuple[Timeline, list[int]] | None:
    """(times of the frames, numbers of the keyframes) by the container's index.

    None where it has no index, or one of keyframes or of the beginning alone.
    """
    entries = getattr(stream, "index_entries", None)
    if not stream.frames or entries is None or len(entries) < _COMPLETE * stream.frames:
        return None
    check_num_frames(len(entries), options)
    shown = [(entry.timestamp, entry.is_keyframe) for entry in entries if not entry.is_discard]
    if not shown:
        return None
    # Decoding order, not presentation order: as many frames, as evenly spaced, from an origin of its own.
    tick_s = float(stream.time_base)
    ticks = np.array([tick for tick, _ in shown], dtype=np.float64)
    seconds = np.sort(ticks - ticks.min()) * tick_s
    if seconds[-1] < _COMPLETE * float(stream.duration or 0) * tick_s - 1.0:
        return None
    check_duration(float(seconds[-1]), settings.end_s, options)
    keys = [number for number, (_, is_key) in enumerate(shown) if is_key]
    return Timeline(seconds, constant_rate(seconds, tick_s, stated_rate(stream)), 0.0), keys


def _stated_frames(
    file: RangedFile, container: Any, stream: Any, settings: MediumSettings, options: MediaOptions
) -> Timeline:
    """Times of the frames by the duration and the rate that the file states; else by its beginning."""
    rate, (duration_s, _) = stated_rate(stream), stated_seconds(container, stream)
    if duration_s <= 0 or rate <= 0:
        span_s, measured = _extrapolated(file, container, stream)
        duration_s, rate = (duration_s, measured) if duration_s > 0 else (span_s, rate or measured)
    check_duration(duration_s, settings.end_s, options)
    total = max(1, round(duration_s * rate))
    check_num_frames(total, options)
    return Timeline(np.arange(total) / rate, rate, 0.0)


def _extrapolated(file: RangedFile, container: Any, stream: Any) -> tuple[float, float]:
    """(seconds, frames a second) of a file that states neither, as browsers record: as if it went on as it begins."""
    seconds: list[float] = []
    position = 0
    with contextlib.suppress(av.error.FFmpegError, IndexError):
        for packet in container.demux(stream):
            tick = packet.dts if packet.pts is None else packet.pts
            if tick is not None:
                seconds.append(float(tick * packet.time_base))
                position = max(position, packet.pos or 0)
            if len(seconds) > _BEGINNING_FRAMES and (position > _BEGINNING_BYTES or file.tell() > _COUNTED_BYTES):
                break
    span = max(seconds, default=0.0) - min(seconds, default=0.0)
    if span <= 0:
        raise TruncatedMedia("the file states neither duration nor frame rate, and its first frames have no times")
    return span * max(1.0, len(file) / max(position, 1)), (len(seconds) - 1) / span


def _num_decoded(places: list[int], keys: list[int]) -> int:
    """Frames from the keyframe before each place up to it, each counted once; without keys from the first place."""
    needed: set[int] = set()
    for place in places:
        number = bisect_right(keys, place)
        needed.update(range(keys[number - 1] if number else places[0], place + 1))
    return len(needed)


def _counted(file: RangedFile, settings: MediumSettings, options: MediaOptions) -> MediumHeader:
    """By every packet, as the run does it."""
    video = OpenVideo(file.read_all(), settings, options)
    try:
        _, needed = video.wanted_and_needed_packets()
        size = ShownSize("video", video.height, video.width, video.num_frames, settings, options)
        steps = prompt_seconds(video.planned_seconds, options.family)
        return MediumHeader("video", video.width, video.height, size, len(file), len(needed), steps)
    finally:
        video.close()
