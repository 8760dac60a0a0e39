"""A medium's bytes to the patches that the model sees, and a receipt of what was done, in one pass.

    bytes --open--> size, frames --fit--> size shown --decode, resize, patchify--> patches uint8

Knows media, their settings and budgets; not where bytes come from, prompts or other processes. Pixels stay uint8 and
are copied as seldom as can be: frames of a video are resized and patchified one temporal step at a time, so a long
video never stands whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.engine.sequence import TEMPORAL_PATCH_SIZE
from pipeline.errors import MediaMemoryError
from pipeline.preprocess.frame_list import unpack_frames
from pipeline.preprocess.image import OpenImage
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.patches import (
    Uint8Array,
    patchify_image,
    patchify_video,
    resize_frames,
)
from pipeline.preprocess.receipt import SeenMedium, shown_source
from pipeline.preprocess.size import ShownSize, pixel_bounds
from pipeline.preprocess.video.frames import OpenVideo
from pipeline.preprocess.video.listed import ListedVideo
from pipeline.preprocess.video.timing import prompt_seconds
from pipeline.schema import MediumReceipt

_Video: TypeAlias = OpenVideo | ListedVideo
Allocate = Callable[[int], Uint8Array]
"""Gives a buffer of so many bytes, [bytes], into which patches are written."""


class OpenMedium:
    """A medium whose size and frames are known and whose pixels have not been decoded.

    Raises MediaError subclasses for bytes that can't be decoded and SettingError for settings that can't be applied;
    `see` does too. `max_visual_tokens` is not applied here but to all media of a row, by `fit_row`.
    """

    def __init__(
        self, kind: MediumKind, data: bytes | memoryview, settings: MediumSettings, options: MediaOptions
    ) -> None:
        self._resize = options.resize
        self._family = options.family
        pixel_bounds(kind, settings, options)  # refused before anything is opened
        self._medium: OpenImage | _Video
        if kind == "image":
            self._medium = OpenImage(data, options)
        elif (frames := unpack_frames(data)) is not None:
            self._medium = ListedVideo(frames, settings, options)
        else:
            self._medium = OpenVideo(data, settings, options)
        num_frames = 1 if isinstance(self._medium, OpenImage) else self._medium.num_frames
        self.size = ShownSize(kind, self._medium.height, self._medium.width, num_frames, settings, options)

    def see(self, *, source: str, allocate: Allocate) -> SeenMedium:
        """Decode, resize and patchify; once only. Patches go into a buffer from `allocate`."""
        try:
            if isinstance(self._medium, OpenImage):
                return self._see_image(self._medium, source, allocate)
            return self._see_video(self._medium, source, allocate)
        except (MemoryError, RuntimeError) as error:
            # torch reports a failed allocation as a RuntimeError.
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise MediaMemoryError(f"the medium's pixels don't fit into memory: {error}") from error

    def _see_image(self, image: OpenImage, source: str, allocate: Allocate) -> SeenMedium:
        pixels = image.decode()
        source_height, source_width, _ = pixels.shape
        height, width = self.size.resize(source_height, source_width)
        grid = self.size.grid_of(1, height, width)
        patches = self._patches(allocate, "image", grid)
        resized = resize_frames(pixels[None], height, width, resize=self._resize)[0]
        patchify_image(resized, patches, patch_size=self._family.patch_size)
        sizes = (source_width, source_height, width, height)
        note = _joined(image.note, self.size.note)
        return SeenMedium(patches, MediumReceipt("image", shown_source(source), *sizes, grid, note=note))

    def _see_video(self, video: _Video, source: str, allocate: Allocate) -> SeenMedium:
        timestamps: list[float] = []
        step: list[Uint8Array] = []  # resized frames of the temporal step under way
        last_pixels: Uint8Array | None = None
        for second, pixels in video.frames():
            if not timestamps:
                source_height, source_width, _ = pixels.shape
                height, width = self.size.resize(source_height, source_width)
                grid = self.size.grid_of(self.size.num_frames, height, width)
                rest = patches = self._patches(allocate, "video", grid)
                step_patches = math.prod(grid[1:])
            if pixels is not last_pixels:  # a frame that stays on screen for long comes repeatedly
                last_pixels = pixels
                resized = resize_frames(pixels[None], height, width, resize=self._resize)[0]
            timestamps.append(second)
            step.append(resized)
            if len(step) == TEMPORAL_PATCH_SIZE:
                patchify_video(np.stack(step), rest[:step_patches], patch_size=self._family.patch_size)
                rest, step = rest[step_patches:], []
        if step:
            patchify_video(np.stack(step), rest[:step_patches], patch_size=self._family.patch_size)
        grid = self.size.grid_of(len(timestamps), height, width)  # fewer frames than planned where the file is damaged
        # Qwen3-VL's processor, whose bounds count all frames, refuses a single one.
        is_doubled = len(timestamps) == 1 and self._family.video_area == "video"
        note = _joined(video.note, "one frame, shown as two equal ones" if is_doubled else None, self.size.note)
        sizes = (source_width, source_height, width, height)
        receipt = MediumReceipt("video", shown_source(source), *sizes, grid, tuple(timestamps), note)
        steps = prompt_seconds(video.counted_seconds, self._family)
        return SeenMedium(patches[: math.prod(grid)], receipt, steps, video.seconds_per_step)

    def _patches(self, allocate: Allocate, kind: MediumKind, grid: tuple[int, int, int]) -> Uint8Array:
        """Room for the patches of a grid, [patches, bytes]."""
        patch_bytes = self._family.patch_bytes(kind)
        return allocate(math.prod(grid) * patch_bytes).reshape(-1, patch_bytes)


def _joined(*notes: str | None) -> str | None:
    return "; ".join(filter(None, notes)) or None
