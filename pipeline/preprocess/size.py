"""At which size a medium is shown: pixel bounds, a video's cap over all its frames, a row's budget of visual tokens.

    width, height, frames --bounds, cap--> resized size --row's budget--> smaller still

The one rule of the run (which decodes) and of the plan (which reads headers). Knows numbers; not codecs or bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.errors import SettingError
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.patches import FACTOR, grid_thw, num_visual_tokens, smart_resize, video_max_pixels

_VIDEO_SETTINGS = ("fps", "num_frames", "start_s", "end_s")
# transformers never caps a video's frames below this multiple of their least area.
_CAP_SLACK = 1.05


def pixel_bounds(kind: MediumKind, settings: MediumSettings, options: MediaOptions) -> tuple[int, int]:
    """(least, largest) area in pixels after resizing, of an image or a video's frame. Raises SettingError."""
    if kind == "video":
        return _bounds(settings, options.video_min_pixels, options.video_max_pixels, slack=_CAP_SLACK)
    for name in _VIDEO_SETTINGS:
        if getattr(settings, name) is not None:
            raise SettingError(f"{name} can't be applied to an image: remove it or give a video")
    return _bounds(settings, options.min_pixels, options.max_pixels)


class ShownSize:
    """The size at which a medium of so many pixels and frames is shown; `shrink` makes it smaller."""

    def __init__(
        self,
        kind: MediumKind,
        height: int,
        width: int,
        num_frames: int,
        bounds: tuple[int, int],
        options: MediaOptions,
    ) -> None:
        self.num_frames = num_frames
        self._source = (height, width)
        self._min_pixels, self._max_pixels = bounds
        if kind == "video":
            self._max_pixels = video_max_pixels(
                num_frames=num_frames,
                min_pixels=self._min_pixels,
                max_pixels=self._max_pixels,
                total_pixels=options.video_total_pixels,
            )
        self.note: str | None = None
        """That the row's budget decided the size."""

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) in pixels to which the stored picture comes; turning it upright may swap them."""
        return self.resize(*self._source)

    def resize(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which a picture of this size in pixels comes. Swapped sides give swapped sides."""
        return smart_resize(height, width, min_pixels=self._min_pixels, max_pixels=self._max_pixels)

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Patches in time, height and width, if all frames can be decoded."""
        return grid_thw(self.num_frames, *self.resized)

    @property
    def num_visual_tokens(self) -> int:
        """Tokens that the medium takes in the prompt, if all its frames can be decoded."""
        return num_visual_tokens(self.grid_thw)

    def shrink(self, factor: float) -> None:
        """Lower the largest area to `factor` times the present one."""
        height, width = self.resized
        self._max_pixels = max(FACTOR * FACTOR, int(height * width * factor))
        self._min_pixels = min(self._min_pixels, self._max_pixels)


class _Sized(Protocol):
    @property
    def size(self) -> ShownSize: ...


def fit_row(media: Sequence[_Sized], max_visual_tokens: int | None) -> None:
    """Shrink a row's media together, each by the same share of its area, until they fit into the budget.

    Raises SettingError where they don't fit even at the smallest size.
    """
    if max_visual_tokens is None:
        return
    sizes = [medium.size for medium in media]
    wanted = [size.num_visual_tokens for size in sizes]
    total = asked = sum(wanted)
    while total > max_visual_tokens:
        for size in sizes:
            size.shrink(max_visual_tokens / total)
        shrunk = sum(size.num_visual_tokens for size in sizes)
        if shrunk >= total:  # sides are multiples of 28 pixels: there is a smallest size
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
