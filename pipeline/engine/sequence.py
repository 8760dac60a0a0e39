"""What goes into the engine, what comes out, and the state of a sample in between.

    Request (frozen)  -->  n x Sequence (mutable, one per sample)  -->  n x Completion (frozen)

Knows token ids, patches and their grids. Knows no text, files or torch, so that the scheduler can be tested in
milliseconds.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.engine.settings import SamplingParams
from pipeline.errors import RowError

MERGE_SIZE = 2
"""Patches on each side of the block that becomes one visual token, in every family."""
TEMPORAL_PATCH_SIZE = 2
"""Frames that make one temporal step, in every family."""

_CHANNELS = 3


def patch_bytes(kind: str, patch_size: int) -> int:
    """Bytes of one patch: (3 channels, side, side), and for a video (3 channels, 2 frames, side, side)."""
    return _CHANNELS * patch_size**2 * (1 if kind == "image" else TEMPORAL_PATCH_SIZE)


FinishReason = Literal["stop", "length", "repetition", "error"]
RequestId = int | str


@dataclass(frozen=True, eq=False)
class Medium:
    """One image or video, as uint8 patches in transformers' order.

    `patches` is [t*h*w, bytes]: merge block after merge block, so four neighbouring rows make one visual token.
    The two temporal halves of a still image are equal, so only one is sent: 588 bytes for a patch of 14 x 14 pixels,
    and 1,176 of a video.
    """

    kind: Literal["image", "video"]
    grid_thw: tuple[int, int, int]
    patches: npt.NDArray[np.uint8]
    seconds_per_step: float = 1.0
    """Of a video: from one temporal step to the next."""

    def __post_init__(self) -> None:
        t, h, w = self.grid_thw
        if self.kind not in ("image", "video"):
            raise ValueError(f"medium kind is {self.kind!r}; allowed: image, video")
        if t < 1 or h < 1 or w < 1 or h % MERGE_SIZE or w % MERGE_SIZE or (self.kind == "image" and t > 1):
            raise ValueError(
                f"grid_thw of the {self.kind} is {self.grid_thw}; expected an even height and width, and one temporal "
                "step for an image or at least one for a video"
            )
        found = self.patches
        if found.dtype != np.uint8 or found.ndim != 2 or len(found) != t * h * w or not self.patch_size:
            raise ValueError(
                f"patches are {found.dtype} {found.shape}; expected uint8 ({t * h * w}, the bytes of a square patch)"
            )

    @property
    def patch_size(self) -> int:
        """Pixels of a patch's side; 0 where a patch's bytes make no square."""
        num_bytes = self.patches.shape[1]
        side = math.isqrt(num_bytes // (_CHANNELS * (1 if self.kind == "image" else 2)))
        return side if num_bytes == patch_bytes(self.kind, side) else 0

    @property
    def num_patches(self) -> int:
        t, h, w = self.grid_thw
        return t * h * w

    @property
    def num_visual_tokens(self) -> int:
        return self.num_patches // MERGE_SIZE**2

    @cached_property
    def content_key(self) -> bytes:
        """Equal for media with equal bytes and grid; they are encoded once."""
        digest = hashlib.blake2b(repr((self.kind, self.grid_thw)).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.patches).data)
        return digest.digest()


@dataclass(frozen=True, eq=False)
class Request:
    """One row for the engine. `input_ids` already holds one placeholder id for each visual token."""

    request_id: RequestId
    input_ids: npt.NDArray[np.int32]
    media: tuple[Medium, ...] = ()
    """In order of appearance among the placeholders."""
    sampling: SamplingParams = field(default_factory=SamplingParams)

    @property
    def num_visual_tokens(self) -> int:
        return sum(medium.num_visual_tokens for medium in self.media)


@dataclass(frozen=True)
class Completion:
    """One finished sample of a request. `token_ids` ends with the end token, as transformers' does."""

    request_id: RequestId
    index: int
    """0 to n - 1."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None
    error: RowError | None = None
    stop_reason: int | str | None = None
    """With `stop`: the end token or stop string that ended it."""
    num_cut: int = 0
    """Characters at the end of its text that are no part of the answer: from the stop string's start on."""


def error_completions(request: Request, error: RowError) -> list[Completion]:
    """The n completions of a request that can't be answered."""
    logprobs = () if request.sampling.logprobs else None
    return [Completion(request.request_id, index, (), "error", logprobs, error) for index in range(request.sampling.n)]


class VisualRun(NamedTuple):
    """Neighbouring visual tokens of one medium in a prompt."""

    medium: int
    """Its number among the request's media."""
    first: int
    """The medium's visual tokens before this run."""
    start: int
    """Token range [start, stop) in the prompt."""
    stop: int


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """Where the media of a prompt lie, and the positions of its tokens (see models/mrope.py)."""

    positions: npt.NDArray[np.int32]
    """[3, tokens]: temporal, height, width."""
    delta: int
    """The position of an output token is its index plus this, on all three axes."""
    runs: tuple[VisualRun, ...]
    """Where the visual tokens lie, in order."""


@dataclass(eq=False)
class Sequence:
    """The state of one sample. Only independent facts are stored, besides three facts of the request that every pass
    reads; everything else is a property.

        prompt tokens ................ | output tokens ......... | in flight
        0            num_prompt_tokens   num_tokens

    `num_computed` tokens have keys and values in the cache, or will have after the pass that now runs.
    Tokens in flight have been chosen on the device and not yet been read by the host.
    """

    request: Request
    index: int
    seed: int
    layout: PromptLayout
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_computed: int = 0
    num_in_flight: int = 0
    block_table: list[int] = field(default_factory=list)
    row: int = -1
    """Its row in the runner's per-sequence tensors while it owns blocks."""
    num_preemptions: int = 0
    is_sorted: bool = False
    """Whether the scheduler has sorted it into the last waiting sequences."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cut: int = 0
    error: RowError | None = None
    sampling: SamplingParams = field(init=False)
    num_prompt_tokens: int = field(init=False)
    max_num_tokens: int = field(init=False)
    """Tokens that may ever need a slot in the cache; the last token chosen is never fed back."""

    def __post_init__(self) -> None:
        self.sampling = self.request.sampling
        self.num_prompt_tokens = len(self.request.input_ids)
        self.max_num_tokens = self.num_prompt_tokens + self.sampling.max_tokens - 1

    @property
    def num_tokens(self) -> int:
        """Tokens that the host knows: prompt and output."""
        return self.num_prompt_tokens + len(self.output_ids)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def positions(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Three-axis positions [3, stop - start]; output tokens continue where the prompt ended."""
        prompt = self.layout.positions[:, start:stop]
        if stop <= self.num_prompt_tokens:
            return prompt
        first = max(start, self.num_prompt_tokens)
        output = np.arange(first, stop, dtype=np.int32) + np.int32(self.layout.delta)
        return np.concatenate([prompt, np.broadcast_to(output, (3, len(output)))], axis=1)

    def known_ids(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Token ids [start, stop) of prompt and output."""
        prompt = self.request.input_ids[start:stop]
        if stop <= self.num_prompt_tokens:
            return prompt
        first = max(0, start - self.num_prompt_tokens)
        output = np.asarray(self.output_ids[first : stop - self.num_prompt_tokens], dtype=np.int32)
        return np.concatenate([prompt, output]) if len(prompt) else output

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None, num_cut: int = 0) -> None:
        assert not self.is_finished, f"sequence {self.request.request_id}/{self.index} finished twice"
        self.finish_reason = reason
        self.stop_reason, self.num_cut = stop_reason, num_cut

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(
            request_id=self.request.request_id,
            index=self.index,
            token_ids=tuple(self.output_ids),
            finish_reason=self.finish_reason,
            logprobs=tuple(self.logprobs) if self.sampling.logprobs else None,
            error=self.error,
            stop_reason=self.stop_reason,
            num_cut=self.num_cut,
        )
