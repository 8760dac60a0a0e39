"""The wanted frames of a video, decoded to upright RGB.

Only packets from the keyframe that leads to a wanted frame are decoded:

    packets     K p p p p p K p p p p p K p p p p p        K keyframe; a p depends on packets before it
    wanted            ^                       ^
    decoded     D D D D                 D D D D            the middle group is skipped

On the way to a wanted frame, frames that no other frame refers to are not decoded either. One thread: throughput comes
from processes. Knows decoders; not resizing or patches.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from pipeline.conversation import MediumSettings
from pipeline.errors import TruncatedMedia
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.video.container import (
    MemoryFile,
    check_frame_size,
    ffmpeg_errors,
    open_container,
    video_stream,
)
from pipeline.preprocess.video.packets import PacketIndex, read_packets
from pipeline.preprocess.video.timing import check_video_settings, nearest_keyframes

# What a decoder raises for a damaged packet: what it would have shown is missing, the rest may be fine.
_DAMAGE = (av.error.InvalidDataError, av.error.EOFError, av.error.ArgumentError, av.error.UnknownError)


class OpenVideo:
    """A video whose frames have been listed and chosen, but not decoded.

    Raises MediaError subclasses (UnsupportedMedia, TruncatedMedia, NoVideoStream, DecompressionBomb, AspectRatioError)
    and SettingError.
    """

    def __init__(self, data: bytes | memoryview, settings: MediumSettings, options: MediaOptions) -> None:
        check_video_settings(settings)
        self._data = data
        self._options = options
        with ffmpeg_errors(data):
            self._container = open_container(MemoryFile(data))
            stream = video_stream(self._container)
            self._decoder: Any = stream.codec_context
            self._decoder.thread_count = 1
            self._decoder.thread_type = "NONE"
            self.width: int = self._decoder.width
            """Pixels as stored, before rotation for display."""
            self.height: int = self._decoder.height
            check_frame_size(self.width, self.height, options)
            self._index, damage = read_packets(self._container, stream, settings.end_s, options)
        if not self._index.packet_of:
            raise TruncatedMedia(f"the video stream holds no frames ({len(data):,} bytes)")
        self.frame_indices, notes = self._index.timeline.choose(settings, options)
        """The wanted frames. One that stays on screen for long may be wanted repeatedly."""
        self._notes = [*([damage] if damage else []), *notes]
        if options.video_frames == "keyframes":
            self._choose_keyframes()

    @property
    def num_frames(self) -> int:
        """Frames that will be shown if all of them can be decoded."""
        return len(self.frame_indices)

    @property
    def note(self) -> str | None:
        """What was done otherwise than asked; complete once the frames have been read."""
        return "; ".join(self._notes) or None

    def close(self) -> None:
        """Release the file, where its frames are not wanted after all."""
        self._container.close()

    def wanted_and_needed_packets(self) -> tuple[frozenset[int], frozenset[int]]:
        """(times of the wanted frames in the stream's unit, numbers of all packets that lead to them)."""
        index = self._index
        needed: set[int] = set()
        for frame in self.frame_indices:
            needed.update(range(index.key_before(frame), index.packet_of[frame] + 1))
        return frozenset(index.ticks[frame] for frame in self.frame_indices), frozenset(needed)

    def frames(self) -> Iterator[tuple[float, npt.NDArray[np.uint8]]]:
        """The wanted frames in turn: (second, RGB pixels [H, W, 3]), upright and all of one size.

        Fewer than `num_frames` where the end of the file is damaged; TruncatedMedia when there is none at all.
        """
        shape: tuple[int, int] | None = None
        last_index, pixels = -1, None
        with ffmpeg_errors(self._data), contextlib.closing(self._container):
            for frame_index, frame in self._decoded_frames():
                if (frame.width, frame.height) != shape:
                    check_frame_size(frame.width, frame.height, self._options)
                    if shape is None:
                        shape = frame.width, frame.height
                    else:
                        note = f"some frames are not {shape[0]}x{shape[1]} pixels and were scaled to it"
                        self._notes += [note] if note not in self._notes else []
                        frame = frame.reformat(width=shape[0], height=shape[1], interpolation="BICUBIC")
                if pixels is None or frame_index != last_index:
                    last_index, pixels = frame_index, _upright(frame)
                yield round(self._index.timeline.seconds[frame_index], 6), pixels
        if pixels is None:
            raise TruncatedMedia(
                f"none of the {self.num_frames} frames to show could be decoded (codec {self._decoder.name}, "
                f"{len(self._data):,} bytes): the file is damaged or ends too early"
            )

    def _choose_keyframes(self) -> None:
        frame_of = {packet: frame for frame, packet in enumerate(self._index.packet_of)}
        keyframes = sorted(frame_of[packet] for packet in self._index.keyframes if packet in frame_of)
        if keyframes:
            chosen = nearest_keyframes(self.frame_indices, keyframes, self._index.timeline.seconds)
            self._notes.append(f"keyframes: {len(chosen)} shown in place of {self.num_frames} sampled frames")
            self.frame_indices = chosen

    def _decoded_frames(self) -> Iterator[tuple[int, Any]]:
        """(index, decoded frame) of the wanted frames; the frame before replaces one that can't be decoded."""
        index, keys_only = self._index, self._options.video_frames == "keyframes"
        decoder = _ForwardDecoder(self._decoder, index, self.frame_indices, keys_only=keys_only)
        num_missing = num_lost = 0
        previous: Any = None
        for frame_index in self.frame_indices:
            tick, key = index.ticks[frame_index], index.key_before(frame_index)
            frame = decoder.frame_at(tick, key)
            if frame is None and decoder.skipping:
                # Some decoders need the skipped frames to learn how far output is reordered: once more, with them.
                decoder.skipping = False
                decoder.restart(key)
                frame = decoder.frame_at(tick, key)
            if frame is None:
                num_missing += 1
                frame = None if decoder.ended else decoder.before or previous or decoder.ahead
            if frame is None:  # the damage reaches to the end
                num_lost += 1
                continue
            previous = frame
            yield frame_index, frame
        if num_missing:
            repeated = f", {num_missing - num_lost} of them show the frame before" if num_missing > num_lost else ""
            left_out = f", {num_lost} left out" if num_lost else ""
            self._notes.append(f"{num_missing} of {self.num_frames} frames could not be decoded{repeated}{left_out}")


class _ForwardDecoder:
    """Moves a decoder forward through the packets, and on to a keyframe where that skips some."""

    def __init__(self, decoder: Any, index: PacketIndex, frame_indices: list[int], *, keys_only: bool) -> None:
        self._decoder = decoder
        self._index = index
        self._wanted_packets = {index.packet_of[frame] for frame in frame_indices}
        self._keys_only = keys_only
        self._next = 0
        self._num_passed = 0
        self._ready: deque[Any] = deque()
        self.before: Any = None
        """The last frame that was passed on the way; None after a restart."""
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
                at = frame.pts if self._index.by_time else self._num_passed
                if at == tick:
                    return frame
                if at is not None and at > tick:
                    return None
                self.before = self._ready.popleft()
                self._num_passed += 1
            if self.ended:
                return None
            self._decode_next()

    def _decode_next(self) -> None:
        packets = self._index.packets
        self.ended = self._next >= len(packets)
        if not self.ended:
            skip = self.skipping and self._next not in self._wanted_packets
            self._decoder.skip_frame = "NONREF" if skip else "DEFAULT"
            self._decode(packets[self._next])
            self._next += 1
            self.ended = self._keys_only  # nothing that follows is of use, so the decoder need not wait for it
        if self.ended:
            self._decode(None)

    def _decode(self, packet: av.Packet | None) -> None:
        with contextlib.suppress(*_DAMAGE):
            self._ready.extend(self._decoder.decode(packet))


def _upright(frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
    """RGB pixels [H, W, 3], turned as the container says; FFmpeg leaves that to the player."""
    pixels: npt.NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    quarter_turns = round((frame.rotation or 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarter_turns)) if quarter_turns else pixels
