"""At which size a medium is shown: pixel bounds, a video's cap over all its frames, a row's budget of visual tokens.

    width, height, frames --bounds, cap--> resized size --row's budget--> smaller still

The one rule of the run (which decodes) and of the plan (which reads headers). Knows numbers; not codecs or bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.engine.sequence import MERGE_SIZE, TEMPORAL_PATCH_SIZE
from pipeline.errors import AspectRatioError, DecompressionBomb, SettingError, UnsupportedMedia
from pipeline.preprocess.limits import MediaOptions

MAX_ASPECT_RATIO = 200
# transformers never caps a video's frames below this multiple of their least area.
_CAP_SLACK = 1.05
_NO_BOUND = 1 << 62
_MOST_VISUAL_TOKENS = 1 << 20
"""Of a row: more than any model's context, and gigabytes of patches."""


def check_source_size(kind: MediumKind, width: int, height: int, options: MediaOptions) -> None:
    """Raises DecompressionBomb for an image or a frame of too many pixels, AspectRatioError for one too long."""
    if width * height > options.max_image_pixels:
        raise DecompressionBomb(
            f"{'the image' if kind == 'image' else 'a frame of the video'} has {width}x{height} = {width * height:,} "
            f"pixels; at most {options.max_image_pixels:,} are decoded (media.max_image_pixels)"
        )
    _check_aspect_ratio(width, height)


def _check_aspect_ratio(width: int, height: int) -> None:
    short, long = sorted((width, height))
    if long > MAX_ASPECT_RATIO * short:
        raise AspectRatioError(
            f"{width}x{height} pixels is {long / short:.0f}:1; the model takes at most {MAX_ASPECT_RATIO}:1: "
            "crop or pad the medium"
        )


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size (height, width) in pixels at which the model sees a medium: multiples of `factor`, area within bounds.

    Equal to transformers' function of the same name, banker's rounding and all, except that a side which it
    rounds to 0 (possible only where `min_pixels` is 0) is an error here.
    Raises AspectRatioError above 200:1 and UnsupportedMedia for an empty side.
    """
    if height < 1 or width < 1:
        raise UnsupportedMedia(f"the medium is {width}x{height} pixels; both sides must be at least 1")
    _check_aspect_ratio(width, height)
    resized_height = round(height / factor) * factor
    resized_width = round(width / factor) * factor
    if resized_height * resized_width > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        resized_height = max(factor, math.floor(height / beta / factor) * factor)
        resized_width = max(factor, math.floor(width / beta / factor) * factor)
    elif resized_height * resized_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        resized_height = math.ceil(height * beta / factor) * factor
        resized_width = math.ceil(width * beta / factor) * factor
    if not resized_height or not resized_width:
        raise UnsupportedMedia(
            f"{width}x{height} pixels rounds to {resized_width}x{resized_height} at min_pixels {min_pixels}; "
            f"set min_pixels to at least {factor * factor}"
        )
    return resized_height, resized_width


def video_smart_resize(
    num_frames: int, height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size (height, width) of a video's frames where the bounds are those of all frames together.

    Equal to the `smart_resize` of transformers' Qwen3VLVideoProcessor: a side below the factor is scaled up first, and
    the number of frames is rounded to a multiple of 2, halves to even, for comparing with the bounds. A single frame,
    which that function refuses, counts as the two equal ones that it is shown as.
    """
    num_frames = max(num_frames, TEMPORAL_PATCH_SIZE)
    height, width = _scaled_up(height, width, factor)
    resized_height, resized_width = round(height / factor) * factor, round(width / factor) * factor
    area = round(num_frames / TEMPORAL_PATCH_SIZE) * TEMPORAL_PATCH_SIZE * resized_height * resized_width
    if area > max_pixels:
        beta = math.sqrt((num_frames * height * width) / max_pixels)
        resized_height = max(factor, math.floor(height / beta / factor) * factor)
        resized_width = max(factor, math.floor(width / beta / factor) * factor)
    elif area < min_pixels:
        beta = math.sqrt(min_pixels / (num_frames * height * width))
        resized_height = math.ceil(height * beta / factor) * factor
        resized_width = math.ceil(width * beta / factor) * factor
    return resized_height, resized_width


def _scaled_up(height: int, width: int, factor: int) -> tuple[int, int]:
    """A size whose sides are no shorter than `factor`. Raises AspectRatioError."""
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect_ratio(width, height)
    return height, width


def video_max_pixels(*, num_frames: int, min_pixels: int, max_pixels: int, total_pixels: int) -> int:
    """The most pixels a frame may have, so that `num_frames` of them stay within `total_pixels`.

    The rule of transformers' `cap_pixels_per_frame` and of qwen-vl-utils: an even share of the total, but never
    less than 1.05 times `min_pixels`.
    """
    return max(min(max_pixels, total_pixels * TEMPORAL_PATCH_SIZE // num_frames), int(min_pixels * _CAP_SLACK))


def grid_thw(num_frames: int, height: int, width: int, *, patch_size: int) -> tuple[int, int, int]:
    """(t, gh, gw) of `num_frames` frames (1 for an image) at a resized height and width in pixels."""
    return math.ceil(num_frames / TEMPORAL_PATCH_SIZE), height // patch_size, width // patch_size


def num_visual_tokens(grid: Sequence[int]) -> int:
    """Tokens that a medium takes in the prompt: one for each 2 x 2 patches."""
    t, grid_h, grid_w = grid
    return t * grid_h * grid_w // MERGE_SIZE**2


def pixel_bounds(kind: MediumKind, settings: MediumSettings, options: MediaOptions) -> tuple[int, int]:
    """(least, largest) area in pixels after resizing, of an image or a video's frame. Raises SettingError."""
    if kind == "video":
        low = options.video_min_pixels or options.family.factor**2
        high = options.video_max_pixels or max(low, _NO_BOUND)
        return _bounds(settings, low, high, options.family.factor, slack=_CAP_SLACK)
    return _bounds(settings, options.min_pixels, options.max_pixels, options.family.factor)


class ShownSize:
    """The size at which a medium of so many pixels and frames is shown; `shrink` makes it smaller."""

    def __init__(
        self,
        kind: MediumKind,
        height: int,
        width: int,
        num_frames: int,
        settings: MediumSettings,
        options: MediaOptions,
    ) -> None:
        self.num_frames = num_frames
        self._family = options.family
        self.patch_bytes = options.family.patch_bytes(kind)
        """Bytes of one patch."""
        self._source = (height, width)
        self._min_pixels, self._max_pixels = pixel_bounds(kind, settings, options)
        self._total_pixels: int | None = None
        """Of all frames, where the family bounds these."""
        self._fixed: tuple[int, int] | None = None
        if settings.resized_height is not None and settings.resized_width is not None:
            # As qwen-vl-utils has it: within an image's bounds, whatever the kind, and without a cap over all frames.
            self._fixed = settings.resized_height, settings.resized_width
            self._min_pixels, self._max_pixels = options.min_pixels, options.max_pixels
        elif kind == "video" and self._family.video_area == "video":
            self._total_pixels = settings.total_pixels or options.video_total_pixels
        elif kind == "video":
            self._max_pixels = video_max_pixels(
                num_frames=num_frames,
                min_pixels=self._min_pixels,
                max_pixels=self._max_pixels,
                total_pixels=settings.total_pixels or options.video_total_pixels,
            )
        self.note: str | None = None
        """That the row's budget decided the size."""

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) in pixels to which the stored picture comes; turning it upright may swap them."""
        return self.resize(*self._source)

    def resize(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which a picture of this size in pixels comes. Swapped sides give swapped sides.

        A size that its row sets is that of the upright picture, whatever was stored.
        """
        height, width = self._fixed or (height, width)
        factor, low, high = self._family.factor, self._min_pixels, self._max_pixels
        if self._total_pixels is not None:
            least = min(self._family.video_min_pixels, self._total_pixels)
            resized = video_smart_resize(
                self.num_frames, height, width, factor=factor, min_pixels=least, max_pixels=self._total_pixels
            )
            if low <= math.prod(resized) <= high:
                return resized
            # The frame's own bounds, which only the job, the row or its budget of visual tokens set, win.
            height, width = _scaled_up(height, width, factor)
        return smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Patches in time, height and width, if all frames can be decoded."""
        return self.grid_of(self.num_frames, *self.resized)

    def grid_of(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Patches in time, height and width of so many frames of this resized size in pixels."""
        return grid_thw(num_frames, height, width, patch_size=self._family.patch_size)

    @property
    def num_visual_tokens(self) -> int:
        """Tokens that the medium takes in the prompt, if all its frames can be decoded."""
        return num_visual_tokens(self.grid_thw)

    def shrink(self, factor: float) -> None:
        """Lower the largest area to `factor` times the present one."""
        height, width = self.resized
        self._max_pixels = max(self._family.factor**2, int(height * width * factor))
        self._min_pixels = min(self._min_pixels, self._max_pixels)


class _Sized(Protocol):
    @property
    def size(self) -> ShownSize: ...


def fit_row(media: Sequence[_Sized], max_visual_tokens: int | None) -> None:
    """Shrink a row's media together, each by the same share of its area, until they fit into the budget.

    Raises SettingError where they don't fit even at the smallest size, or are too large for any model without a budget.
    """
    sizes = [medium.size for medium in media]
    wanted = [size.num_visual_tokens for size in sizes]
    total = asked = sum(wanted)
    if max_visual_tokens is None:
        if total > _MOST_VISUAL_TOKENS:
            raise SettingError(
                f"the row's media would take {total:,} visual tokens, more than any model reads; lower "
                "min_pixels, max_pixels or the resized size, or set max_visual_tokens"
            )
        return
    while total > max_visual_tokens:
        for size in sizes:
            size.shrink(max_visual_tokens / total)
        shrunk = sum(size.num_visual_tokens for size in sizes)
        if shrunk >= total:  # sides are multiples of some pixels: there is a smallest size
            raise SettingError(
                f"the row's {len(media)} media need at least {shrunk} visual tokens; max_visual_tokens is "
                f"{max_visual_tokens}: raise it, or show fewer media or frames"
            )
        total = shrunk
    for size, before in zip(sizes, wanted, strict=True):
        if size.num_visual_tokens != before:
            size.note = (
                f"shrunk from {before} to {size.num_visual_tokens} visual tokens: the row's media wanted {asked}, "
                f"max_visual_tokens is {max_visual_tokens}"
            )


def _bounds(settings: MediumSettings, low: int, high: int, factor: int, *, slack: float = 1.0) -> tuple[int, int]:
    """(min_pixels, max_pixels) of a medium; where its row sets one bound, the job's other bound gives way."""
    for name in ("min_pixels", "max_pixels"):
        value = getattr(settings, name)
        if value is not None and value < factor**2:
            raise SettingError(f"{name} is {value}; expected at least {factor**2}, one visual token")
    if settings.max_pixels is not None:
        high = settings.max_pixels
        low = settings.min_pixels if settings.min_pixels is not None else min(low, int(high / slack))
    elif settings.min_pixels is not None:
        low = settings.min_pixels
        high = max(low, high)
    return low, high
