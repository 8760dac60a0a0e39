"""What a medium will be to the model, learned from its header: size, frames, tokens. Nothing is decoded.

    file --Pillow's or FFmpeg's header--> pixels, frames --the run's own rules--> shown size

An image's size is exact. A video's frames are counted by its index where that is complete (MP4, MOV, AVI), by its
packets where the file is small, and otherwise by its stated duration and rate. Damage past the header is not seen, nor
that a stored picture is turned: turning swaps the sides and changes no count.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import av.logging
import numpy as np

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.errors import RowError, TruncatedMedia
from pipeline.preprocess.image import OpenImage
from pipeline.preprocess.limits import MIB, MediaOptions
from pipeline.preprocess.ranged import RangedFile
from pipeline.preprocess.size import ShownSize, pixel_bounds
from pipeline.preprocess.video import (
    FOREIGN_ERRORS,
    OpenVideo,
    Timeline,
    check_duration,
    check_frame_size,
    check_num_frames,
    check_video_settings,
    constant_rate,
    nearest_keyframes,
    open_container,
    stated_rate,
    translated,
    video_stream,
)

# What FFmpeg writes of broken headers comes back as errors; its own lines would land in the plan's page.
av.logging.set_level(None)

_READ_BYTES = 64 * 1024
_COUNTED_BYTES = 8 * MIB
"""Videos without an index up to this size are read whole and their packets counted."""
_WHOLE = 0.9
"""Share of the frames and of the duration that an index must cover to be taken for whole."""


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
    duration_s: float = 0.0
    is_exact: bool = True
    """Whether the frames were counted, rather than taken from what the file says of itself."""


def read_header(kind: MediumKind, file: RangedFile, settings: MediumSettings, options: MediaOptions) -> MediumHeader:
    """Raises MediaError subclasses, SettingError, and whatever reading the file raises."""
    bounds = pixel_bounds(kind, settings, options)
    try:
        if kind == "video":
            return _video(file, settings, options, bounds)
        image = OpenImage(file, options)
    except RowError:
        if file.fault is not None:  # which a parser may have taken for the end of the file
            raise file.fault from None
        raise
    size = ShownSize(kind, image.height, image.width, 1, bounds, options)
    return MediumHeader(kind, image.width, image.height, size, len(file))


def _video(file: RangedFile, settings: MediumSettings, options: MediaOptions, bounds: tuple[int, int]) -> MediumHeader:
    check_video_settings(settings)
    try:
        with open_container(file, buffer_size=_READ_BYTES) as container:
            stream = video_stream(container)
            width, height = stream.codec_context.width, stream.codec_context.height
            check_frame_size(width, height, options)
            frames = _frames_by_index(stream, settings, options)
            if frames is None and len(file) > _COUNTED_BYTES:
                frames = _frames_as_stated(container, stream, settings, options)
        if file.fault is not None:
            raise file.fault
    except FOREIGN_ERRORS as error:
        raise translated(error, file) from error
    if frames is None:
        file.seek(0)
        return _counted(file, settings, options, bounds)
    size = ShownSize("video", height, width, frames.shown, bounds, options)
    return MediumHeader(
        "video", width, height, size, len(file), frames.decoded, frames.duration_s, is_exact=frames.exact
    )


@dataclass(frozen=True)
class _Frames:
    shown: int
    decoded: int
    duration_s: float
    exact: bool


def _frames_by_index(stream: Any, settings: MediumSettings, options: MediaOptions) -> _Frames | None:
    """Frames by the container's index; None where it has none, or one of keyframes or of the beginning alone."""
    entries = getattr(stream, "index_entries", None)
    if not stream.frames or entries is None or len(entries) < _WHOLE * stream.frames:
        return None
    check_num_frames(len(entries), options)
    tick_s = float(stream.time_base)
    shown = [(entry.timestamp, entry.is_keyframe) for entry in entries if not entry.is_discard]
    if not shown:
        return None
    # Decoding order, not presentation order: as many frames, as evenly spaced, from an origin of its own.
    ticks = np.array([tick for tick, _ in shown], dtype=np.float64)
    seconds = np.sort(ticks - ticks.min()) * tick_s
    duration_s = float(stream.duration or 0) * tick_s
    if seconds[-1] < _WHOLE * duration_s - 1.0:
        return None
    check_duration(float(seconds[-1]), settings.end_s, options)
    timeline = Timeline(seconds, constant_rate(seconds, tick_s, stated_rate(stream)), 0.0)
    places, _ = timeline.choose(settings, options)
    keys = [place for place, (_, is_key) in enumerate(shown) if is_key]
    return _chosen(timeline, places, keys, options, exact=True)


def _frames_as_stated(container: Any, stream: Any, settings: MediumSettings, options: MediaOptions) -> _Frames:
    """Frames by the duration and the rate that the file states."""
    rate = stated_rate(stream)
    if stream.duration is not None:
        duration_s = float(stream.duration * stream.time_base)
    else:
        duration_s = (container.duration or 0) / 1e6
    if duration_s <= 0 or rate <= 0:
        raise TruncatedMedia("the file states neither duration nor frame rate: it may end too early")
    check_duration(duration_s, settings.end_s, options)
    total = max(1, round(duration_s * rate))
    check_num_frames(total, options)
    timeline = Timeline(np.arange(total) / rate, rate, 0.0)
    places, _ = timeline.choose(settings, options)
    return _chosen(timeline, places, [], options, exact=False)


def _chosen(timeline: Timeline, places: list[int], keys: list[int], options: MediaOptions, *, exact: bool) -> _Frames:
    if options.video_frames == "keyframes" and keys:
        places = nearest_keyframes(places, keys, timeline.seconds)
        return _Frames(len(places), len(places), timeline.duration_s, exact)
    return _Frames(len(places), _num_decoded(places, keys), timeline.duration_s, exact)


def _num_decoded(places: list[int], keys: list[int]) -> int:
    """Frames from the keyframe before each place up to it, each counted once."""
    if not keys:
        return places[-1] + 1 - places[0]
    count, done = 0, -1
    for place in places:
        number = bisect_right(keys, place)
        start = max(keys[number - 1] if number else 0, done + 1)
        count += max(0, place + 1 - start)
        done = max(done, place)
    return count


def _counted(
    file: RangedFile, settings: MediumSettings, options: MediaOptions, bounds: tuple[int, int]
) -> MediumHeader:
    """By the run's own look at every packet."""
    video = OpenVideo(file.read(), settings, options)
    try:
        _, needed = video.wanted_and_needed_packets()
        size = ShownSize("video", video.height, video.width, video.num_frames, bounds, options)
        return MediumHeader("video", video.width, video.height, size, len(file), len(needed), video.duration_s)
    finally:
        video.close()
