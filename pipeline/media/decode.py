"""A medium's bytes to the patches that the model sees, and a receipt of what was done, in one pass.

    bytes --open--> size, frames --fit--> size shown --decode, resize, patchify--> patches uint8

Knows media, their settings and budgets; not where bytes come from, prompts or other processes. Pixels stay uint8 and
are copied as seldom as can be: frames of a video are resized and patchified one temporal step at a time, so a long
video never stands whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.errors import MediaMemoryError, SettingError
from pipeline.media.image import OpenImage
from pipeline.media.limits import MediaOptions
from pipeline.media.video import OpenVideo
from pipeline.patches import (
    FACTOR,
    IMAGE_PATCH_BYTES,
    TEMPORAL_PATCH_SIZE,
    VIDEO_PATCH_BYTES,
    Uint8Array,
    grid_thw,
    num_visual_tokens,
    patchify_image,
    patchify_video,
    resize_frames,
    smart_resize,
    video_max_pixels,
)
from pipeline.schema import MediumReceipt

Allocate = Callable[[int], Uint8Array]
"""Gives a buffer of so many bytes, [bytes], into which patches are written."""

_VIDEO_SETTINGS = ("fps", "num_frames", "start_s", "end_s")
# transformers never caps a video's frames below this multiple of their least area.
_CAP_SLACK = 1.05
_SHOWN_DATA_URI = 40


@dataclass(frozen=True)
class SeenMedium:
    """What the model gets of one medium."""

    patches: npt.NDArray[np.uint8]
    """[patches, 588] for an image, whose two temporal halves are equal; [patches, 1176] for a video."""
    receipt: MediumReceipt


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
        self._budget_note: str | None = None
        self.num_frames = 1
        if kind == "image":
            for name in _VIDEO_SETTINGS:
                if getattr(settings, name) is not None:
                    raise SettingError(f"{name} can't be applied to an image: remove it or give a video")
            self._min_pixels, self._max_pixels = _bounds(settings, options.min_pixels, options.max_pixels)
            self._medium: OpenImage | OpenVideo = OpenImage(data, options)
        else:
            floor, ceiling = _bounds(settings, options.video_min_pixels, options.video_max_pixels, slack=_CAP_SLACK)
            self._medium = OpenVideo(data, settings, options)
            self.num_frames = self._medium.num_frames
            self._min_pixels = floor
            self._max_pixels = video_max_pixels(
                num_frames=self.num_frames,
                min_pixels=floor,
                max_pixels=ceiling,
                total_pixels=options.video_total_pixels,
            )

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) in pixels to which the stored picture comes; rotation for display may swap them."""
        return self._resized(self._medium.height, self._medium.width)

    @property
    def num_visual_tokens(self) -> int:
        """Tokens that the medium takes in the prompt, if all its frames can be decoded."""
        return num_visual_tokens(grid_thw(self.num_frames, *self.resized))

    def shrink(self, factor: float) -> None:
        """Lower the largest area to `factor` times the present one."""
        height, width = self.resized
        self._max_pixels = max(FACTOR * FACTOR, int(height * width * factor))
        self._min_pixels = min(self._min_pixels, self._max_pixels)

    def note_budget(self, note: str) -> None:
        """Say in the receipt that the row's budget decided the size."""
        self._budget_note = note

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
        height, width = self._resized(*pixels.shape[:2])
        grid = grid_thw(1, height, width)
        out = allocate(math.prod(grid) * IMAGE_PATCH_BYTES).reshape(-1, IMAGE_PATCH_BYTES)
        patchify_image(resize_frames(pixels[None], height, width, resize=self._resize)[0], out)
        receipt = MediumReceipt(
            "image", shown_source(source), pixels.shape[1], pixels.shape[0], width, height, grid, note=self._budget_note
        )
        return SeenMedium(out, receipt)

    def _see_video(self, video: OpenVideo, source: str, allocate: Allocate) -> SeenMedium:
        canvas: _Canvas | None = None
        timestamps: list[float] = []
        before: Uint8Array | None = None
        for second, pixels in video.frames():
            if canvas is None:
                canvas = _Canvas(self.num_frames, *self._resized(*pixels.shape[:2]), allocate)
                source_height, source_width, _ = pixels.shape
            if pixels is not before:  # a frame that is shown long comes repeatedly
                before = pixels
                resized = resize_frames(pixels[None], canvas.height, canvas.width, resize=self._resize)[0]
            canvas.add(resized)
            timestamps.append(second)
        assert canvas is not None  # a video without a single frame has raised
        patches, grid = canvas.finish()
        notes = [note for note in (video.note, self._budget_note) if note]
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

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        return smart_resize(height, width, min_pixels=self._min_pixels, max_pixels=self._max_pixels)


class _Canvas:
    """Takes a video's resized frames one by one and lays them out as patches, a temporal step at a time."""

    def __init__(self, num_frames: int, height: int, width: int, allocate: Allocate) -> None:
        self.height, self.width = height, width
        steps, grid_h, grid_w = grid_thw(num_frames, height, width)
        self._step_patches = grid_h * grid_w
        self._out = allocate(steps * self._step_patches * VIDEO_PATCH_BYTES).reshape(-1, VIDEO_PATCH_BYTES)
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


def shown_source(source: str) -> str:
    """A source as receipts show it: the URI, but of a data: URI, which is the medium itself, only its beginning."""
    if not source.startswith("data:") or len(source) <= _SHOWN_DATA_URI:
        return source
    return f"{source[:_SHOWN_DATA_URI]}... ({len(source):,} characters)"


def fit_row(media: Sequence[OpenMedium], max_visual_tokens: int | None) -> None:
    """Shrink a row's media together, each by the same share of its area, until they fit into the budget.

    Raises SettingError where they don't fit even at the smallest size.
    """
    if max_visual_tokens is None:
        return
    wanted = [medium.num_visual_tokens for medium in media]
    total = asked = sum(wanted)
    while total > max_visual_tokens:
        for medium in media:
            medium.shrink(max_visual_tokens / total)
        shrunk = sum(medium.num_visual_tokens for medium in media)
        if shrunk >= total:  # sides are multiples of 28 pixels: there is a smallest size
            raise SettingError(
                f"the row's {len(media)} media need at least {shrunk} visual tokens; max_visual_tokens is "
                f"{max_visual_tokens}: raise it, or show fewer media or frames"
            )
        total = shrunk
    for medium, before in zip(media, wanted, strict=True):
        if medium.num_visual_tokens != before:
            medium.note_budget(
                f"shrunk from {before} to {medium.num_visual_tokens} visual tokens: the row's media wanted {asked}, "
                f"max_visual_tokens is {max_visual_tokens}"
            )


def _bounds(settings: MediumSettings, low: int, high: int, *, slack: float = 1.0) -> tuple[int, int]:
    """(min_pixels, max_pixels) of a medium; where its row sets one bound, the job's other bound gives way."""
    for name in ("min_pixels", "max_pixels"):
        value = getattr(settings, name)
        if value is not None and value < FACTOR * FACTOR:
            raise SettingError(f"{name} is {value}; expected at least {FACTOR * FACTOR}, one visual token")
    if (
        settings.min_pixels is not None
        and settings.max_pixels is not None
        and settings.min_pixels > settings.max_pixels
    ):
        raise SettingError(f"min_pixels {settings.min_pixels} is above max_pixels {settings.max_pixels}")
    if settings.max_pixels is not None:
        high = settings.max_pixels
        low = settings.min_pixels if settings.min_pixels is not None else min(low, int(high / slack))
    elif settings.min_pixels is not None:
        low = settings.min_pixels
        high = max(low, high)
    return low, high


def _allocate(num_bytes: int) -> Uint8Array:
    return np.empty(num_bytes, dtype=np.uint8)
