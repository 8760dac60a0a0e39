"""An encoded video to RGB frames at chosen times, by PyAV.

Knows containers, codecs and frame times; not other machines' files, resizing or patches. Every exception of FFmpeg
ends here, as a MediaError.

One pass over the packets learns every frame's time and every keyframe; sampling then picks frames by presentation
time, and only packets from the keyframe that leads to a wanted frame are decoded:

    packets     K p p p p p K p p p p p K p p p p p        K keyframe; a p depends on packets before it
    wanted            ^                       ^
    decoded     D D D D                 D D D D            the middle group is skipped

The packets are kept from that pass (the file is in memory already), so there is no second read and no seek that lands
where a container pleases. On the way to a wanted frame, frames that no other frame refers to are not decoded either.
One thread: throughput comes from processes.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import av
import numpy as np
import numpy.typing as npt
from av.stream import Disposition

from pipeline.conversation import MediumSettings
from pipeline.errors import (
    AspectRatioError,
    DecompressionBomb,
    MediaError,
    MediaMemoryError,
    NoVideoStream,
    SettingError,
    TruncatedMedia,
    UnsupportedMedia,
)
from pipeline.preprocess.image import MAX_ASPECT_RATIO, Encoded, looks_like
from pipeline.preprocess.limits import MediaOptions

# Containers that hold their own frames. Playlists, concat scripts, image patterns and devices, which open further
# files or hosts, are not among them; and with no protocol allowed, nothing else can be opened either.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,apng,ivf,mxf"
_OPEN_OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
_READ_BYTES = 256 * 1024
_TEMPORAL_PATCH_SIZE = 2
# A file counts as constant-rate while no frame is further from its even place than this share of the interval, or
# than one and a half ticks where the time base is coarse (Matroska counts milliseconds).
_EVEN_SHARE, _EVEN_TICKS = 0.1, 1.5
# Seconds by which decoding order may run ahead of presentation order.
_REORDER_MARGIN_S = 2.0
_TIME_EPSILON_S = 1e-6
_RATE_WITHOUT_TIMES = 25.0


@dataclass(frozen=True)
class VideoFrames:
    """The sampled frames of one video."""

    frames: npt.NDArray[np.uint8]
    """[T, H, W, 3], RGB, upright, at the size in the file."""
    timestamps: tuple[float, ...]
    """Second at which each frame is shown, counted from the video's first frame."""
    source_width: int
    source_height: int
    note: str | None
    """What was done otherwise than asked."""


def decode_video(
    data: bytes | memoryview | str | os.PathLike[str], settings: MediumSettings, options: MediaOptions
) -> VideoFrames:
    """The sampled frames of an encoded video (or of the file at a path), all at once; errors as OpenVideo."""
    video = OpenVideo(data, settings, options)
    timestamps, frames = zip(*video.frames(), strict=True)
    height, width, _ = frames[0].shape
    return VideoFrames(np.stack(frames), timestamps, width, height, video.note)


def num_sampled_frames(
    total: int, duration_s: float, *, fps: float | None, num_frames: int | None, min_frames: int, max_frames: int
) -> int:
    """How many of `total` frames to show: the rule of transformers' `Qwen2VLVideoProcessor.sample_frames`.

    A video of a single frame gives one. Raises SettingError where transformers refuses: more frames than there are.
    """
    step = _TEMPORAL_PATCH_SIZE
    if num_frames is not None:
        count = round(num_frames / step) * step
        if count < step or count > total:
            raise SettingError(
                f"num_frames {num_frames} (taken as {count}, a multiple of {step}) can't be sampled from the video's "
                f"{total} frames: set it to between {step} and {total // step * step}, or set fps"
            )
        return count
    assert fps is not None
    if total < step:
        return total
    most = math.floor(min(max_frames, total) / step) * step
    return max(step, math.floor(min(max(duration_s * fps, min_frames), most, total) / step) * step)


def even_places(total: int, count: int) -> list[int]:
    """`count` places spread over `range(total)`: transformers' own expression.

    It rounds in float32, so past some ten thousand frames a place may be one off the exact quotient. For one pair of
    numbers in twenty it also gives one place more, which lies past the end: that is left out.
    """
    import torch

    places: list[int] = torch.arange(0, total, total / count)[:count].int().tolist()
    return places


class Timeline:
    """When the frames of a video are shown, in presentation order. `rate` is None for a variable rate."""

    def __init__(self, seconds: npt.NDArray[np.float64], rate: float | None, last_s: float) -> None:
        """`last_s` is for how long the last frame is shown, where the file says so."""
        self.seconds: list[float] = seconds.tolist()
        """When each frame is shown, counted from the first."""
        self.rate = rate
        """Frames a second of a constant-rate video, None for a variable rate."""
        if rate is not None:
            last_s = 1 / rate
        elif not last_s and len(seconds) > 1:
            last_s = float(np.median(np.diff(seconds)))
        self.duration_s: float = self.seconds[-1] + last_s if self.seconds else 0.0
        """Second at which the last frame is no longer shown."""

    def choose(self, settings: MediumSettings, options: MediaOptions) -> tuple[list[int], list[str]]:
        """The frames to show, by number in presentation order, and what was done otherwise than asked.

        A frame that is shown long may be wanted repeatedly. Raises SettingError.
        """
        notes: list[str] = []
        first, end, segment_s = self._segment(settings, notes)
        total = end - first
        num_frames, fps = settings.num_frames, settings.fps
        if num_frames is None and fps is None:
            num_frames, fps = options.num_frames, options.fps
            if num_frames is not None and num_frames > total:
                notes.append(f"all {total} frames shown: num_frames is {num_frames}")
                num_frames, fps = None, math.inf
        count = num_sampled_frames(
            total,
            segment_s,
            fps=fps,
            num_frames=num_frames,
            min_frames=options.min_frames,
            max_frames=options.max_frames if fps != math.inf else total,
        )
        if self.rate is not None:
            return [first + place for place in even_places(total, count)], notes
        start_s = max(settings.start_s or 0.0, self.seconds[first])
        times = [start_s + number * segment_s / count + _TIME_EPSILON_S for number in range(count)]
        return [max(first, bisect_right(self.seconds, time, first, end) - 1) for time in times], notes

    def _segment(self, settings: MediumSettings, notes: list[str]) -> tuple[int, int, float]:
        """(first frame, frame past the last, seconds) between start_s and end_s."""
        total = len(self.seconds)
        if settings.start_s is None and settings.end_s is None:
            # Divided as transformers divides, so that a product that should be whole falls on the same side.
            return 0, total, total / self.rate if self.rate is not None else self.duration_s
        start_s = settings.start_s or 0.0
        end_s = settings.end_s if settings.end_s is not None else self.duration_s
        if start_s >= self.duration_s:
            raise SettingError(f"start_s {start_s:g} is past the end of the video, which lasts {self.duration_s:g} s")
        if end_s > self.duration_s + _TIME_EPSILON_S:
            notes.append(f"end_s {end_s:g} is past the end of the video, {self.duration_s:g} s")
            end_s = self.duration_s
        first = bisect_left(self.seconds, start_s - _TIME_EPSILON_S)
        end = bisect_left(self.seconds, end_s - _TIME_EPSILON_S)
        if first >= end:  # no frame begins in the segment: the one that is on screen then
            first, end = max(0, end - 1), max(1, end)
        return first, end, (end - first) / self.rate if self.rate is not None else end_s - start_s


def open_container(file: Any, *, buffer_size: int = _READ_BYTES) -> Any:
    """The container in a file, read so many bytes at a time; nothing else can be opened through it."""
    return av.open(file, options=_OPEN_OPTIONS, metadata_errors="replace", buffer_size=buffer_size)


def video_stream(container: Any) -> Any:
    """The stream to show. Raises NoVideoStream."""
    attached = Disposition.attached_pic | Disposition.timed_thumbnails
    pictures = 0
    for stream in container.streams.video:
        if stream.disposition & attached:
            pictures += 1
        elif stream.codec_context is not None:
            return stream
    kinds = [stream.type for stream in container.streams]
    found = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none"
    raise NoVideoStream(
        f"the file has no video stream that can be decoded; its streams: {found}"
        + (f" ({pictures} of them an attached picture)" if pictures else "")
    )


def check_frame_size(width: int, height: int, options: MediaOptions) -> None:
    """Refuse frames of a shape that is not decoded. Raises DecompressionBomb, AspectRatioError."""
    if width * height > options.max_image_pixels:
        raise DecompressionBomb(
            f"the video's frames are {width}x{height} = {width * height:,} pixels; at most "
            f"{options.max_image_pixels:,} are decoded (max_image_pixels)"
        )
    if not width or not height:
        return  # known only once a frame has been decoded
    short, long = sorted((width, height))
    if long > MAX_ASPECT_RATIO * short:
        raise AspectRatioError(
            f"{width}x{height} pixels is {long / short:.0f}:1; the model takes at most "
            f"{MAX_ASPECT_RATIO}:1: crop or pad the video"
        )


def check_num_frames(count: int, options: MediaOptions) -> None:
    """Raises DecompressionBomb for more frames in the file than are looked at."""
    if count > options.max_video_frames:
        raise DecompressionBomb(f"the video has more than {options.max_video_frames:,} frames (max_video_frames)")


def check_duration(seconds: float, end_s: float | None, options: MediaOptions) -> None:
    """Raises DecompressionBomb for a video that goes on for too long, unless its row ends it before."""
    if seconds > options.max_video_s and (end_s is None or end_s > options.max_video_s):
        raise DecompressionBomb(
            f"the video is longer than {options.max_video_s:g} s (max_video_s); "
            "set start_s and end_s to show a part of it"
        )


def stated_rate(stream: Any) -> float:
    """Frames a second, as the container says; 0 where it does not."""
    return float(stream.average_rate or stream.guessed_rate or 0)


class _Index:
    """All frames of a video in presentation order: when each is shown, and which packet holds it."""

    def __init__(self, packets: list[Any], hidden: list[bool], stream: Any) -> None:
        self.packets = packets
        """In decoding order."""
        shown = [number for number, is_hidden in enumerate(hidden) if not is_hidden]
        times = [packets[number].pts for number in shown]
        self.by_time = None not in times and len(set(times)) == len(times)
        """Whether frames can be told apart by their time; else (AVI, raw streams) only by their order."""
        if self.by_time:
            shown.sort(key=lambda number: packets[number].pts)
        self.packet_of: list[int] = shown
        """Place in `packets` of each frame."""
        self.ticks: list[int] = [packets[number].pts for number in shown] if self.by_time else list(range(len(shown)))
        """The decoder's name for each frame: its time in the stream's own unit, or its number."""
        self.keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
        rate = stated_rate(stream)
        if self.by_time:
            tick_s = float(stream.time_base)
            seconds = (np.array(self.ticks, dtype=np.float64) - (self.ticks[0] if self.ticks else 0)) * tick_s
            last_s = (packets[shown[-1]].duration or 0) * tick_s if shown else 0.0
            self.timeline = Timeline(seconds, constant_rate(seconds, tick_s, rate), last_s)
        else:
            rate = rate or _RATE_WITHOUT_TIMES
            self.timeline = Timeline(np.arange(len(shown)) / rate, rate, 0.0)

    def key_before(self, frame: int) -> int:
        """Place in `packets` from which decoding must start to get this frame right."""
        if not self.by_time:
            return 0
        # A frame that follows a keyframe in the file but is shown before it still needs the group before.
        number = bisect_right(self.keys, self.packet_of[frame])
        while number and self.packets[self.keys[number - 1]].pts > self.ticks[frame]:
            number -= 1
        return self.keys[number - 1] if number else 0


class OpenVideo:
    """A video whose frames have been listed and chosen, but not decoded.

    `data` is the encoded file, or the path of one. Raises MediaError subclasses (UnsupportedMedia, TruncatedMedia,
    NoVideoStream, DecompressionBomb, AspectRatioError) and SettingError.
    """

    def __init__(
        self, data: bytes | memoryview | str | os.PathLike[str], settings: MediumSettings, options: MediaOptions
    ) -> None:
        check_video_settings(settings)
        self._options = options
        self._notes: list[str] = []
        self._data = data if isinstance(data, bytes | memoryview) else memoryview(_read(data))
        try:
            self._container = open_container(_MemoryFile(self._data))
            self._stream = video_stream(self._container)
            self._decoder: Any = self._stream.codec_context
            self._decoder.thread_count = 1
            self._decoder.thread_type = "NONE"
            self.width: int = self._decoder.width
            """Pixels as stored, before rotation for display."""
            self.height: int = self._decoder.height
            check_frame_size(self.width, self.height, options)
            self._index = self._read_index(settings.end_s)
        except FOREIGN_ERRORS as error:
            self._raise_translated(error)
        if not self._index.packet_of:
            raise TruncatedMedia(f"the video stream holds no frames ({len(self._data):,} bytes)")
        self.places, notes = self._index.timeline.choose(settings, options)
        """The wanted frames, by number in presentation order; one that is shown long may be wanted repeatedly."""
        self._notes += notes
        if options.video_frames == "keyframes":
            self.places = self._nearest_keyframes(self.places)

    @property
    def num_frames(self) -> int:
        """Frames that will be shown if all of them can be decoded."""
        return len(self.places)

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return self._index.timeline.duration_s

    def close(self) -> None:
        """Let go of the file, where its frames are not wanted after all."""
        self._container.close()

    @property
    def timestamps(self) -> tuple[float, ...]:
        """Second at which each wanted frame is shown, counted from the video's first frame."""
        return tuple(round(self._index.timeline.seconds[place], 6) for place in self.places)

    @property
    def note(self) -> str | None:
        """What was done otherwise than asked; complete once the frames have been read."""
        return "; ".join(self._notes) or None

    def wanted_and_needed_packets(self) -> tuple[frozenset[int], frozenset[int]]:
        """(times of the wanted frames in the stream's unit, places in the file of all packets that lead to them)."""
        index = self._index
        needed: set[int] = set()
        for place in self.places:
            needed.update(range(index.key_before(place), index.packet_of[place] + 1))
        return frozenset(index.ticks[place] for place in self.places), frozenset(needed)

    def frames(self) -> Iterator[tuple[float, npt.NDArray[np.uint8]]]:
        """The wanted frames in turn: (second, RGB pixels [H, W, 3]), upright and all of one size.

        Fewer than `num_frames` where the end of the file is damaged; TruncatedMedia when there is none at all.
        """
        shape: tuple[int, int] | None = None
        place, pixels = -1, None
        try:
            for wanted, frame in self._decoded_frames():
                if shape is None:
                    check_frame_size(frame.width, frame.height, self._options)
                    shape = frame.width, frame.height
                elif (frame.width, frame.height) != shape:
                    check_frame_size(frame.width, frame.height, self._options)
                    self._note_once(f"some frames are not {shape[0]}x{shape[1]} pixels and were scaled to it")
                    frame = frame.reformat(width=shape[0], height=shape[1], interpolation="BICUBIC")
                if pixels is None or wanted != place:
                    place, pixels = wanted, _upright(frame)
                yield round(self._index.timeline.seconds[wanted], 6), pixels
        except FOREIGN_ERRORS as error:
            self._raise_translated(error)
        finally:
            self._container.close()
        if pixels is None:
            raise TruncatedMedia(
                f"none of the {self.num_frames} frames to show could be decoded (codec {self._decoder.name}, "
                f"{len(self._data):,} bytes): the file is damaged or ends too early"
            )

    # -- the list of frames, made without decoding ---------------------------------------------------------------------

    def _read_index(self, end_s: float | None) -> _Index:
        tick_s = float(self._stream.time_base or 0)
        packets: list[Any] = []
        hidden: list[bool] = []
        origin: int | None = None
        demuxed = self._container.demux(self._stream)
        while True:
            try:
                packet = next(demuxed, None)
            except av.error.FFmpegError as error:
                if not packets:
                    raise
                self._notes.append(f"the file is damaged after {len(packets)} frames ({_first_line(error)})")
                break
            if packet is None:
                break
            if not packet.size:  # marks the end of the stream
                continue
            packets.append(packet)
            hidden.append(packet.is_discard or self._shows_nothing(packet))
            check_num_frames(len(packets), self._options)
            if packet.dts is None or not tick_s:
                continue
            origin = packet.dts if origin is None else min(origin, packet.dts)
            seconds = (packet.dts - origin) * tick_s
            check_duration(seconds, end_s, self._options)
            if end_s is not None and seconds > end_s + _REORDER_MARGIN_S:
                break
        return _Index(packets, hidden, self._stream)

    def _shows_nothing(self, packet: Any) -> bool:
        # VP8 sends reference frames that are never shown as packets of their own; bit 4 is show_frame.
        return self._decoder.name.startswith(("vp8", "libvpx")) and not memoryview(packet)[0] & 0x10

    def _nearest_keyframes(self, places: list[int]) -> list[int]:
        index = self._index
        of_packet = {number: place for place, number in enumerate(index.packet_of)}
        keys = sorted(of_packet[number] for number in index.keys if number in of_packet)
        if not keys:
            return places
        chosen = nearest_keyframes(places, keys, index.timeline.seconds)
        self._notes.append(f"keyframes: {len(chosen)} shown in place of {len(places)} sampled frames")
        return chosen

    # -- decoding ------------------------------------------------------------------------------------------------------

    def _decoded_frames(self) -> Iterator[tuple[int, Any]]:
        """(wanted place, decoded frame) in turn; the frame before stands in for one that can't be decoded."""
        index, keys_only = self._index, self._options.video_frames == "keyframes"
        walk = _Walk(self._decoder, index, self.places, keys_only=keys_only)
        missing = lost = 0
        previous: Any = None
        for place in self.places:
            tick, key = index.ticks[place], index.key_before(place)
            frame = walk.frame_at(tick, key)
            if frame is None and walk.skipping:
                # Some decoders need the skipped frames to learn how far output is reordered: once more, with them.
                walk.skipping = False
                walk.restart(key)
                frame = walk.frame_at(tick, key)
            if frame is None:
                missing += 1
                frame = None if walk.ended else walk.before or previous or walk.ahead
            if frame is None:  # the damage reaches to the end
                lost += 1
                continue
            previous = frame
            yield place, frame
        if missing:
            repeated = f", {missing - lost} of them show the frame before" if missing > lost else ""
            left_out = f", {lost} left out" if lost else ""
            self._notes.append(f"{missing} of {self.num_frames} frames could not be decoded{repeated}{left_out}")

    def _note_once(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)

    def _raise_translated(self, error: BaseException) -> NoReturn:
        raise translated(error, self._data) from error


def nearest_keyframes(places: list[int], keys: list[int], seconds: list[float]) -> list[int]:
    """The keyframe nearest to each place, each once; `keys` are places too."""
    nearest = [min(keys, key=lambda key: abs(seconds[key] - seconds[place])) for place in places]
    return list(dict.fromkeys(nearest))


class _Walk:
    """Moves a decoder forward through the packets, jumping to a keyframe where that leaves something out."""

    def __init__(self, decoder: Any, index: _Index, places: list[int], *, keys_only: bool) -> None:
        self._decoder = decoder
        self._index = index
        self._wanted_packets = {index.packet_of[place] for place in places}
        self._keys_only = keys_only
        self._next = 0
        self._count = 0
        self._ready: deque[Any] = deque()
        self.before: Any = None
        """The last frame that was passed on the way; None after a jump."""
        self.ended = False
        self.skipping = index.by_time
        """Whether frames that nothing refers to, and nobody wants, are left undecoded."""

    @property
    def ahead(self) -> Any:
        """The first decoded frame that is not yet passed."""
        return self._ready[0] if self._ready else None

    def restart(self, packet: int) -> None:
        """Continue at a packet, as if nothing had been decoded."""
        self._decoder.flush_buffers()
        self._next, self.before, self.ended = packet, None, False
        self._ready.clear()

    def frame_at(self, tick: int, key: int) -> Any:
        """The frame of this tick, or None where it can't be decoded; `key` is the packet that leads to it."""
        if key > self._next or self._keys_only:
            self.restart(key)
        while True:
            while self._ready:
                frame = self._ready[0]
                at = self._tick(frame)
                if at == tick:
                    return frame
                if at is not None and at > tick:
                    return None
                self.before = self._ready.popleft()
                self._count += 1
            if self.ended:
                return None
            self._feed()

    def _tick(self, frame: Any) -> int | None:
        pts: int | None = frame.pts
        return pts if self._index.by_time else self._count

    def _feed(self) -> None:
        packets = self._index.packets
        if self._next >= len(packets):
            self.ended = True
            self._decode(None)
            return
        skip = self.skipping and self._next not in self._wanted_packets
        self._decoder.skip_frame = "NONREF" if skip else "DEFAULT"
        self._decode(packets[self._next])
        self._next += 1
        if self._keys_only:  # nothing that follows is of use, so the decoder need not wait for it
            self._decode(None)
            self.ended = True

    def _decode(self, packet: Any) -> None:
        # A damaged packet: what it would have shown is missing, the rest may be fine.
        with contextlib.suppress(*_DAMAGE):
            self._ready.extend(self._decoder.decode(packet))


_DAMAGE = (av.error.InvalidDataError, av.error.EOFError, av.error.ArgumentError, av.error.UnknownError)
FOREIGN_ERRORS = (av.error.FFmpegError, MemoryError, UnicodeDecodeError, OSError, ValueError, EOFError)


class _MemoryFile(io.RawIOBase):
    """Bytes as a file that FFmpeg can read, without a copy of the whole."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._view = memoryview(data)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        end = len(self._view) if size < 0 else self._position + size
        part = bytes(self._view[self._position : end])
        self._position += len(part)
        return part

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position


def _read(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def constant_rate(seconds: npt.NDArray[np.float64], tick_s: float, stated: float) -> float | None:
    """Frames a second where frames are evenly spaced, else None. The container's own figure where it agrees."""
    if len(seconds) < 2:
        return stated or None
    interval = float(seconds[-1]) / (len(seconds) - 1)
    uneven = float(np.abs(seconds - np.arange(len(seconds)) * interval).max())
    if interval <= 0 or uneven > max(_EVEN_SHARE * interval, _EVEN_TICKS * tick_s):
        return None
    measured = 1 / interval
    return stated if abs(stated - measured) < 0.01 * measured else measured


def _upright(frame: Any) -> npt.NDArray[np.uint8]:
    """RGB pixels [H, W, 3], turned as the container says; FFmpeg leaves that to the player."""
    pixels: npt.NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    quarter_turns = round((frame.rotation or 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarter_turns)) if quarter_turns else pixels


def check_video_settings(settings: MediumSettings) -> None:
    """Refuse settings that can be applied to no video. Raises SettingError."""
    if settings.fps is not None and settings.num_frames is not None:
        raise SettingError(f"fps {settings.fps:g} and num_frames {settings.num_frames} exclude each other: set one")
    if settings.fps is not None and not (math.isfinite(settings.fps) and settings.fps > 0):
        raise SettingError(f"fps is {settings.fps}; expected a number above 0")
    if settings.num_frames is not None and settings.num_frames < _TEMPORAL_PATCH_SIZE:
        raise SettingError(f"num_frames is {settings.num_frames}; expected at least {_TEMPORAL_PATCH_SIZE}")
    for name, value in (("start_s", settings.start_s), ("end_s", settings.end_s)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise SettingError(f"{name} is {value}; expected seconds from 0")
    if settings.end_s is not None and settings.end_s <= (settings.start_s or 0.0):
        raise SettingError(f"end_s {settings.end_s:g} is not after start_s {settings.start_s or 0.0:g}")


def translated(error: BaseException, data: Encoded) -> MediaError:
    """An exception of FFmpeg as one of ours; `data` is looked at for what the file may be."""
    size = f"{len(data):,} bytes"
    if isinstance(error, MediaError):
        return error
    if isinstance(error, MemoryError):
        return MediaMemoryError(f"the video's frames don't fit into memory ({size} encoded)")
    if not len(data):
        return TruncatedMedia("the medium has 0 bytes")
    if bytes(data[4:8]) == b"ftyp" and not _has_box(data, b"moov"):
        return TruncatedMedia(f"the MP4 file has no index (moov box) in its {size}: it ends too early")
    if isinstance(error, av.error.EOFError):
        return TruncatedMedia(f"the video ends too early ({size})")
    return UnsupportedMedia(
        f"not a video that can be decoded: {looks_like(data)} ({_first_line(error)}); expected one of {FORMATS}"
    )


def _has_box(data: Encoded, name: bytes) -> bool:
    """Whether an MP4 file has this box at its top level."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if bytes(data[at + 4 : at + 8]) == name:
            return True
        if size < 8:
            return False
        at += size
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
