"""A medium's bytes to the patches that the model sees, and a receipt of what was done, in one pass.

    bytes --open--> size, frames --fit--> size shown --decode, resize, patchify--> patches uint8

Knows media, their settings and budgets; not where bytes come from, prompts or other processes. Pixels stay uint8 and
are copied as seldom as can be: frames of a video are resized and patchified one temporal step at a time, so a long
video never stands whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from pipeline.checkpoint.processor import PATCH_BYTES, TEMPORAL_PATCH_SIZE
from pipeline.conversation import MediumKind, MediumSettings
from pipeline.errors import MediaMemoryError
from pipeline.preprocess.image import OpenImage
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.patches import (
    Uint8Array,
    patchify_image,
    patchify_video,
    resize_frames,
)
from pipeline.preprocess.receipt import SeenMedium, shown_source
from pipeline.preprocess.size import ShownSize, fit_row, grid_thw, pixel_bounds
from pipeline.preprocess.video.frames import OpenVideo
from pipeline.schema import MediumReceipt

Allocate = Callable[[int], Uint8Array]
"""Gives a buffer of so many bytes, [bytes], into which patches are written."""


def see_medium(
    kind: MediumKind,
    data: bytes | memoryview,
    settings: MediumSettings,
    options: MediaOptions,
    *,
    source: str,
    allocate: Allocate | None = None,
) -> SeenMedium:
    """Decode, resize and patchify one medium in this thread.

    Raises MediaError subclasses for bytes that can't be seen and SettingError for settings that can't be applied.
    `max_visual_tokens` is applied to this medium alone; a row with several goes through `fit_row`.
    """
    medium = OpenMedium(kind, data, settings, options)
    fit_row([medium], options.max_visual_tokens)
    return medium.see(source=source, allocate=allocate)


class OpenMedium:
    """A medium whose size and frames are known and whose pixels have not been decoded.

    Raises as `see_medium`.
    """

    def __init__(
        self, kind: MediumKind, data: bytes | memoryview, settings: MediumSettings, options: MediaOptions
    ) -> None:
        self._resize = options.resize
        bounds = pixel_bounds(kind, settings, options)
        self._medium: OpenImage | OpenVideo
        if kind == "image":
            self._medium = OpenImage(data, options)
            num_frames = 1
        else:
            self._medium = OpenVideo(data, settings, options)
            num_frames = self._medium.num_frames
        self.size = ShownSize(kind, self._medium.height, self._medium.width, num_frames, bounds, options)

    def see(self, *, source: str, allocate: Allocate | None = None) -> SeenMedium:
        """Decode, resize and patchify; once only. Patches go into a buffer from `allocate`, if given."""
        if allocate is None:
            allocate = _allocate
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
        height, width = self.size.resize(*pixels.shape[:2])
        grid = grid_thw(1, height, width)
        out = allocate(math.prod(grid) * PATCH_BYTES["image"]).reshape(-1, PATCH_BYTES["image"])
        patchify_image(resize_frames(pixels[None], height, width, resize=self._resize)[0], out)
        receipt = MediumReceipt(
            "image", shown_source(source), pixels.shape[1], pixels.shape[0], width, height, grid, note=self.size.note
        )
        return SeenMedium(out, receipt)

    def _see_video(self, video: OpenVideo, source: str, allocate: Allocate) -> SeenMedium:
        canvas: _Canvas | None = None
        timestamps: list[float] = []
        before: Uint8Array | None = None
        for second, pixels in video.frames():
            if canvas is None:
                canvas = _Canvas(self.size.num_frames, *self.size.resize(*pixels.shape[:2]), allocate)
                source_height, source_width, _ = pixels.shape
            if pixels is not before:  # a frame that is shown long comes repeatedly
                before = pixels
                resized = resize_frames(pixels[None], canvas.height, canvas.width, resize=self._resize)[0]
            canvas.add(resized)
            timestamps.append(second)
        assert canvas is not None  # a video without a single frame has raised
        patches, grid = canvas.finish()
        notes = [note for note in (video.note, self.size.note) if note]
        receipt = MediumReceipt(
            "video",
            shown_source(source),
            source_width,
            source_height,
            canvas.width,
            canvas.height,
            grid,
            tuple(timestamps),
            "; ".join(notes) or None,
        )
        return SeenMedium(patches, receipt)


class _Canvas:
    """Takes a video's resized frames one by one and lays them out as patches, a temporal step at a time."""

    def __init__(self, num_frames: int, height: int, width: int, allocate: Allocate) -> None:
        self.height, self.width = height, width
        steps, grid_h, grid_w = grid_thw(num_frames, height, width)
        self._step_patches = grid_h * grid_w
        self._out = allocate(steps * self._step_patches * PATCH_BYTES["video"]).reshape(-1, PATCH_BYTES["video"])
        self._step: Uint8Array = np.empty((TEMPORAL_PATCH_SIZE, height, width, 3), dtype=np.uint8)
        self._num_frames = 0

    def add(self, frame: Uint8Array) -> None:
        """The next frame, [height, width, 3]."""
        step, half = divmod(self._num_frames, TEMPORAL_PATCH_SIZE)
        self._step[half] = frame
        self._num_frames += 1
        if half == TEMPORAL_PATCH_SIZE - 1:
            self._patchify(step, self._step)

    def finish(self) -> tuple[Uint8Array, tuple[int, int, int]]:
        """(patches [t * gh * gw, 1176], grid) of the frames that came; an odd one at the end is repeated."""
        step, half = divmod(self._num_frames, TEMPORAL_PATCH_SIZE)
        if half:
            self._patchify(step, self._step[:half])
        grid = grid_thw(self._num_frames, self.height, self.width)
        return self._out[: math.prod(grid)], grid

    def _patchify(self, step: int, frames: Uint8Array) -> None:
        patchify_video(frames, self._out[step * self._step_patches : (step + 1) * self._step_patches])


def _allocate(num_bytes: int) -> Uint8Array:
    return np.empty(num_bytes, dtype=np.uint8)
