"""What differs between model families outside the forward pass.

A rule is named here and written where its subject is: sizes in preprocess/size.py, frame sampling in
preprocess/video/timing.py, prompts in preprocess/prompt.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.conversation import MediumKind
from pipeline.engine.sequence import MERGE_SIZE, patch_bytes
from pipeline.engine.settings import CLIP_MEAN, CLIP_STD, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a family's makers choose tokens, by the names of the config's section `sampling`. A job takes none of it by
    itself; the defaults here are that section's, greedy and without penalties."""

    temperature: float = SamplingParams.temperature
    top_k: int = SamplingParams.top_k
    top_p: float = SamplingParams.top_p
    repetition_penalty: float = SamplingParams.repetition_penalty
    presence_penalty: float = SamplingParams.presence_penalty


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family, or one of its checkpoints where the checkpoint's own processor config says otherwise."""

    model_type: str
    """As in config.json."""
    title: str
    """As people write it."""
    patch_size: int
    """Pixels of a patch's side."""
    min_pixels: int
    """Least area of an image after resizing."""
    max_pixels: int
    video_area: Literal["frame", "video"]
    """Whether a video's bounds are those of a frame, or of all its frames together."""
    video_min_pixels: int
    video_max_pixels: int
    video_total_pixels: int | None
    """Where the bounds are those of a frame: what all frames share, counted as pixels of frame pairs."""
    frame_sampling: Literal["steps", "ends"]
    """Frames at equal steps from the first and an even number of them, or spread from the first to the last."""
    video_prompt: Literal["one run", "timed steps"]
    """A video's tokens stand in one run, or each temporal step by itself after its time in seconds."""
    sampling: Sampling = Sampling()
    """By the cards, for questions about media."""
    thinking_sampling: Sampling = Sampling()
    """The same for checkpoints that think before they answer."""
    image_mean: tuple[float, ...] = CLIP_MEAN
    """Of each channel, for normalization."""
    image_std: tuple[float, ...] = CLIP_STD

    @property
    def factor(self) -> int:
        """Sides of a resized medium are multiples of this many pixels."""
        return self.patch_size * MERGE_SIZE

    def patch_bytes(self, kind: MediumKind) -> int:
        """Bytes of one patch. An image's two temporal halves are equal, so it has only one."""
        return patch_bytes(kind, self.patch_size)
