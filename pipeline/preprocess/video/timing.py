"""Which frames of a video are shown: when each is on screen, and the sampling rules of transformers and qwen-vl-utils.

    frames, rate --family's rule--> n frames to show --steps: 0, N/n, 2N/n ...  ends: 0 ... N-1--> frame indices

Knows frame times and settings; not files, packets or pixels. A frame index counts frames in presentation order.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.families.family import Family
from pipeline.conversation import MediumSettings
from pipeline.engine.sequence import TEMPORAL_PATCH_SIZE
from pipeline.errors import SettingError
from pipeline.preprocess.limits import MediaOptions

# A file counts as constant-rate while no frame is further from its even place than this share of the interval, or
# than one and a half ticks where the time base is coarse (Matroska counts milliseconds).
_EVEN_SHARE, _EVEN_TICKS = 0.1, 1.5
_TIME_EPSILON_S = 1e-6


def num_sampled_frames(
    total: int, duration_s: float, *, fps: float | None, num_frames: int | None, min_frames: int, max_frames: int
) -> int:
    """How many of `total` frames to show: the rule of transformers' `Qwen2VLVideoProcessor.sample_frames`.

    A video of a single frame gives one. Raises SettingError where transformers refuses: more frames than there are.
    """
    step = TEMPORAL_PATCH_SIZE
    if num_frames is not None:
        count = round(num_frames / step) * step
        if total < step:
            raise SettingError(
                f"num_frames is {num_frames}, but the video has {total} frame{'' if total == 1 else 's'}, and at least "
                f"{step} are needed to choose from: set fps in place of num_frames"
            )
        if count < step or count > total:
            raise SettingError(
                f"num_frames {num_frames} (taken as {count}, a multiple of {step}) can't be sampled from the video's "
                f"{total} frames: set it to between {step} and {total // step * step}, or set fps"
            )
        return count
    assert fps is not None
    if total < step:
        return total
    max_count = math.floor(min(max_frames, total) / step) * step
    return max(step, math.floor(min(max(duration_s * fps, min_frames), max_count, total) / step) * step)


def num_frames_between_ends(total: int, duration_s: float, *, fps: float, min_frames: int, max_frames: int) -> int:
    """How many of `total` frames to show: the rule of transformers' `Qwen3VLVideoProcessor.sample_frames`.

    It may be odd, and all frames of a short video.
    """
    return min(max(int(duration_s * fps), min_frames), max_frames, total)


def between_ends(total: int, count: int) -> list[int]:
    """`count` indices from the first of `range(total)` to its last, in float64: the same processor's own expression.

    Frames are repeated where there are fewer.
    """
    indices: list[int] = np.linspace(0, total - 1, count).round().astype(int).tolist()
    return indices


def evenly_spaced(total: int, count: int) -> list[int]:
    """`count` indices spread over `range(total)`: transformers' own expression.

    It rounds in float32, so past some ten thousand frames an index may be one off the exact quotient. For one pair of
    numbers in twenty it also gives one index more, which lies past the end: that is left out.
    """
    import torch  # rounds as transformers does; its import takes a second, which images don't need

    indices: list[int] = torch.arange(0, total, total / count)[:count].int().tolist()
    return indices


def from_first_to_last(first: int, last: int, count: int) -> list[int]:
    """`count` indices spread from `first` to `last`, both included: the rule of qwen-vl-utils, in float32 as there."""
    import torch  # as above

    indices: list[int] = torch.linspace(first, last, count).round().long().tolist()
    return indices


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


def nearest_keyframes(indices: list[int], keyframes: list[int], seconds: list[float]) -> list[int]:
    """The keyframe nearest in time to each frame, each once."""
    nearest = [min(keyframes, key=lambda key: abs(seconds[key] - seconds[index])) for index in indices]
    return list(dict.fromkeys(nearest))


def prompt_seconds(frame_seconds: Sequence[float], family: Family) -> tuple[float, ...]:
    """The time of each temporal step, for families whose prompts give it: the middle between its first and its last
    frame. An odd frame at the end is shown twice."""
    if family.video_prompt == "one run":
        return ()
    last = len(frame_seconds) - 1
    return tuple(
        (frame_seconds[first] + frame_seconds[min(first + TEMPORAL_PATCH_SIZE - 1, last)]) / 2
        for first in range(0, last + 1, TEMPORAL_PATCH_SIZE)
    )


@dataclass(frozen=True)
class Choice:
    """The frames of a video that are shown."""

    frames: list[int]
    """Their indices. A frame that stays on screen for long may come repeatedly."""
    notes: list[str]
    """What was done otherwise than asked."""
    total: float
    """Frames of the video or its segment, of which these were chosen; seconds where the rate varies."""
    rate: float
    """Frames a second of the file; 1 where the rate varies."""

    def seconds_per_step(self, num_shown: int) -> float:
        """Seconds between the temporal steps of so many frames: transformers' expression, operation by operation."""
        return TEMPORAL_PATCH_SIZE / (num_shown / self.total * self.rate)


class Timeline:
    """When the frames of a video are shown, in presentation order."""

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
        self.last_s = last_s
        self.duration_s: float = self.seconds[-1] + last_s if self.seconds else 0.0
        """Second at which the last frame is no longer shown."""

    def counted_second(self, frame: int) -> float:
        """When a frame is shown as transformers counts it: by its number where the rate is constant."""
        return frame / self.rate if self.rate is not None else self.seconds[frame]

    def choose(self, settings: MediumSettings, options: MediaOptions) -> Choice:
        """The frames to show. Raises SettingError."""
        notes: list[str] = []
        is_qwen = options.frame_sampling == "qwen"
        first, end, segment_s = self._segment(settings, notes, with_end=is_qwen)
        total, ends = end - first, options.family.frame_sampling == "ends"

        def choice(frames: list[int]) -> Choice:
            return Choice(frames, notes, *((segment_s, 1.0) if self.rate is None else (total, self.rate)))

        min_frames = settings.min_frames or options.min_frames
        if is_qwen:  # by number, whatever the rate
            notes.append("frames sampled by the rule of qwen-vl-utils")
            segment_s = total / self.rate if self.rate else total * self.duration_s / len(self.seconds)
            min_frames = math.ceil(min_frames / TEMPORAL_PATCH_SIZE) * TEMPORAL_PATCH_SIZE
        num_frames, fps = settings.num_frames, settings.fps
        max_frames = settings.max_frames or options.max_frames
        if num_frames is None and fps is None:
            by_fps = settings.min_frames or settings.max_frames
            num_frames, fps = None if by_fps else options.num_frames, options.fps
            if num_frames is not None and num_frames > total and (is_qwen or not ends):
                notes.append(f"all {total} frames shown: num_frames is {num_frames}")
                num_frames, fps, max_frames = None, math.inf, total
        if ends and not is_qwen:
            limits = {"min_frames": min_frames, "max_frames": max_frames}
            count = num_frames or num_frames_between_ends(total, segment_s, fps=fps or options.fps, **limits)
        else:
            count = num_sampled_frames(
                total, segment_s, fps=fps, num_frames=num_frames, min_frames=min_frames, max_frames=max_frames
            )
        if is_qwen:
            return choice(from_first_to_last(first, end - 1, count))
        if self.rate is not None:
            return choice([first + index for index in (between_ends if ends else evenly_spaced)(total, count)])
        start_s = max(settings.start_s or 0.0, self.seconds[first])
        # To the beginning of the last frame, or to its end.
        step_s = (self.seconds[end - 1] - start_s) / max(1, count - 1) if ends else segment_s / count
        times = [start_s + number * step_s + _TIME_EPSILON_S for number in range(count)]
        return choice([max(first, bisect_right(self.seconds, time, first, end) - 1) for time in times])

    def _segment(self, settings: MediumSettings, notes: list[str], *, with_end: bool) -> tuple[int, int, float]:
        """(first frame, frame past the last, seconds) between start_s and end_s; `with_end` with the frame at end_s."""
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
        end = bisect_left(self.seconds, end_s + (_TIME_EPSILON_S if with_end else -_TIME_EPSILON_S))
        if first >= end:  # no frame begins in the segment: show the one that is on screen then
            first, end = max(0, end - 1), max(1, end)
        return first, end, (end - first) / self.rate if self.rate is not None else end_s - start_s
