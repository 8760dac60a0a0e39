"""A video given as a list of pictures: all of them are shown, in their order.

Knows pictures; not containers, which this video has none of, nor sampling: whoever made the list has sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.conversation import MediumSettings
from pipeline.engine.sequence import TEMPORAL_PATCH_SIZE
from pipeline.errors import SettingError
from pipeline.preprocess.image import OpenImage
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.video.container import check_num_frames

_SAMPLING = ("num_frames", "start_s", "end_s", "min_frames", "max_frames")


def check_listed(num_frames: int, settings: MediumSettings, options: MediaOptions) -> None:
    """Raises SettingError for settings that choose frames, DecompressionBomb for too many frames."""
    for name in _SAMPLING:
        if getattr(settings, name) is not None:
            raise SettingError(f"{name} can't be applied to a video given as a list of frames: shorten the list")
    check_num_frames(num_frames, options)


class ListedVideo:
    """Pictures whose headers have been read, and whose pixels have not been decoded. Raises as OpenImage."""

    def __init__(self, frames: Sequence[memoryview], settings: MediumSettings, options: MediaOptions) -> None:
        check_listed(len(frames), settings, options)
        self._frames = [OpenImage(frame, options) for frame in frames]
        self._fps = settings.fps or options.fps
        self.width, self.height = self._frames[0].width, self._frames[0].height
        """Pixels of the first frame as stored."""
        self._notes: list[str] = []
        self.counted_seconds: list[float] = []
        """When each frame is shown, by the row's `fps`; complete once the frames have been read."""
        self.seconds_per_step = TEMPORAL_PATCH_SIZE / self._fps
        """Seconds between temporal steps."""

    @property
    def num_frames(self) -> int:
        """Frames that are shown."""
        return len(self._frames)

    @property
    def note(self) -> str | None:
        """What was done otherwise than asked; complete once the frames have been read."""
        return "; ".join(dict.fromkeys(self._notes)) or None

    def frames(self) -> Iterator[tuple[float, npt.NDArray[np.uint8]]]:
        """(second by the row's `fps`, RGB pixels [H, W, 3]) of each frame, all of the first one's size."""
        shape: tuple[int, ...] | None = None
        for number, image in enumerate(self._frames):
            pixels = image.decode()
            shape = shape or pixels.shape
            if pixels.shape != shape:
                height, width, _ = shape
                self._notes.append(f"some frames are not {width}x{height} pixels and were scaled to it")
                pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
            self._notes += [image.note] if image.note else []
            self.counted_seconds.append(number / self._fps)
            yield round(number / self._fps, 6), pixels
