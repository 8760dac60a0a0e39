"""The wanted frames of a video, decoded to upright RGB.

Only packets from the keyframe that leads to a wanted frame are decoded:

    packets     K p p p p p K p p p p p K p p p p p        K keyframe; a p depends on packets before it
    wanted            ^                       ^
    decoded     D D D D                 D D D D            the middle group is skipped

On the way to a wanted frame, frames that no other frame refers to are not decoded either. Knows which frames are shown;
not resizing or patches.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.conversation import MediumSettings
from pipeline.errors import MediaTimeout, SettingError, TruncatedMedia
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.video.container import (
    MemoryFile,
    check_frame_size,
    ffmpeg_errors,
    open_container,
    video_stream,
)
from pipeline.preprocess.video.decoder import ForwardDecoder, open_decoder
from pipeline.preprocess.video.packets import read_packets
from pipeline.preprocess.video.picture import rgb_pixels
from pipeline.preprocess.video.stated import shortfall
from pipeline.preprocess.video.timing import nearest_keyframes

# Seconds of decoding after which its end can be told, and by how much that must exceed the limit to be certain.
_LEAST_SPENT_S, _CERTAIN = 3.0, 2.0


class OpenVideo:
    """A video whose frames have been listed and chosen, but not decoded.

    Raises MediaError subclasses (UnsupportedMedia, TruncatedMedia, NoVideoStream, DecompressionBomb, AspectRatioError)
    and SettingError.
    """

    def __init__(self, data: bytes | memoryview, settings: MediumSettings, options: MediaOptions) -> None:
        self._data = data
        self._options = options
        with ffmpeg_errors(data):
            self._container = open_container(MemoryFile(data))
            stream = video_stream(self._container)
            self._decoder = open_decoder(stream)
            self.width: int = stream.codec_context.width
            """Pixels as stored, before rotation for display."""
            self.height: int = stream.codec_context.height
            check_frame_size(self.width, self.height, options)
            self._index, damage = read_packets(self._container, stream, settings.end_s, options)
            missing = shortfall(self._container, stream, self._index, lambda: open_container(MemoryFile(data)))
        self._notes = [note for note in (damage, missing) if note]
        if not self._index.packet_of:
            raise TruncatedMedia(f"the video stream holds no frames ({len(data):,} bytes)")
        try:
            self._choice = self._index.timeline.choose(settings, options)
        except SettingError as error:
            raise SettingError("; ".join([str(error), *self._notes])) from error
        self.frame_indices = self._choice.frames
        """The wanted frames. One that stays on screen for long may be wanted repeatedly."""
        self.counted_seconds: list[float] = []
        """Those of `planned_seconds` whose frames could be decoded; complete once the frames have been read."""
        self._note(*self._choice.notes)
        self._keyframes_only = options.video_frames == "keyframes" and self._choose_keyframes()

    @property
    def num_frames(self) -> int:
        """Frames that will be shown if all of them can be decoded."""
        return len(self.frame_indices)

    @property
    def planned_seconds(self) -> list[float]:
        """When each wanted frame is shown as transformers counts it."""
        return list(map(self._index.timeline.counted_second, self.frame_indices))

    @property
    def seconds_per_step(self) -> float:
        """Seconds between temporal steps."""
        return self._choice.seconds_per_step(self.num_frames)

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
                        self._note(f"some frames are not {shape[0]}x{shape[1]} pixels and were scaled to it")
                        frame = frame.reformat(width=shape[0], height=shape[1], interpolation="BICUBIC")
                if pixels is None or frame_index != last_index:
                    last_index = frame_index
                    pixels, notes = rgb_pixels(frame)
                    self._note(*notes)
                self.counted_seconds.append(self._index.timeline.counted_second(frame_index))
                yield round(self._index.timeline.seconds[frame_index], 6), pixels
        if pixels is None:
            raise TruncatedMedia(
                f"none of the {self.num_frames} frames to show could be decoded (codec {self._decoder.name}, "
                f"{len(self._data):,} bytes): the file is damaged or ends too early"
            )

    def _note(self, *notes: str) -> None:
        self._notes += [note for note in notes if note not in self._notes]

    def _choose_keyframes(self) -> bool:
        """Whether there are any."""
        frame_of = {packet: frame for frame, packet in enumerate(self._index.packet_of)}
        keyframes = sorted(frame_of[packet] for packet in self._index.keyframes if packet in frame_of)
        if keyframes:
            chosen = nearest_keyframes(self.frame_indices, keyframes, self._index.timeline.seconds)
            self._note(f"keyframes: {len(chosen)} shown in place of {self.num_frames} sampled frames")
            self.frame_indices = chosen
        return bool(keyframes)

    def _check_time(self, num_done: int, num_needed: int, spent_s: float) -> None:
        """Raises MediaTimeout once it is certain that the rest takes too long, rather than at the time limit itself."""
        limit_s = self._options.timeout_s
        if spent_s < min(_LEAST_SPENT_S, 0.1 * limit_s) or not num_done:
            return
        expected_s = spent_s * num_needed / num_done
        if expected_s > _CERTAIN * limit_s:
            raise MediaTimeout(
                f"the {self.num_frames} frames to show need {num_needed:,} frames of {self.width}x{self.height} pixels "
                f"to be decoded, about {expected_s:,.0f} s by the first {num_done:,}; media.timeout_s is {limit_s:g}: "
                "sample fewer with num_frames or fps, set media.video_frames: keyframes, or raise media.timeout_s"
            )

    def _decoded_frames(self) -> Iterator[tuple[int, Any]]:
        """(index, decoded frame) of the wanted frames; the frame before replaces one that can't be decoded."""
        decoder = ForwardDecoder(self._decoder, self._index, self.frame_indices)
        num_missing = num_lost = 0
        previous: Any = None
        num_needed = len(self.wanted_and_needed_packets()[1])
        begun = time.process_time()  # other processes may slow this one down, but not its own time
        for frame_index in self.frame_indices:
            frame = decoder.keyframe(frame_index) if self._keyframes_only else decoder.frame(frame_index)
            if not self._keyframes_only:
                self._check_time(decoder.num_decoded, num_needed, time.process_time() - begun)
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
            self._note(f"{num_missing} of {self.num_frames} frames could not be decoded{repeated}{left_out}")
        if decoder.damaged:
            self._note(f"{len(decoder.damaged)} of the frames that were decoded for these are damaged")
