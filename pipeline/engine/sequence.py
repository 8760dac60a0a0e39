"""What goes into the engine, what comes out, and what it remembers of a sample in between.

    Request (frozen)  -->  n x Sequence (mutable, one for each sample)  -->  n x Completion (frozen)

Knows token ids, patches and their grids. Knows no text, no files and no torch: everything here is
numpy and plain Python, so that the scheduler can be tested in milliseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.engine.settings import SamplingParams
from pipeline.errors import RowError

MERGE_SIZE = 2
"""Patches are merged 2 x 2 into one visual token; Qwen2-VL has no checkpoint with another value."""

PATCH_BYTES = {"image": 588, "video": 1176}
"""Bytes of one patch: (3 channels, 14, 14), and for a video (3 channels, 2 frames, 14, 14)."""

FinishReason = Literal["stop", "length", "repetition", "error"]
RequestId = int | str


def _check(ok: bool, name: str, found: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {found!r}; allowed: {allowed}")


@dataclass(frozen=True, eq=False)
class Medium:
    """One image or video, as uint8 patches in transformers' order.

    `patches` is [t*h*w, bytes]: merge block after merge block, so that four neighbouring rows make one
    visual token. A still image's two temporal halves are equal, so one travels (588 bytes a patch).
    """

    kind: Literal["image", "video"]
    grid_thw: tuple[int, int, int]
    patches: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        t, h, w = self.grid_thw
        _check(self.kind in PATCH_BYTES, "medium kind", self.kind, "image, video")
        _check(t >= 1 and h >= 1 and w >= 1, "grid_thw", self.grid_thw, "1 or more on each axis")
        _check(h % MERGE_SIZE == 0 and w % MERGE_SIZE == 0, "grid_thw", self.grid_thw, "even height and width")
        _check(self.kind == "video" or t == 1, "grid_thw of an image", self.grid_thw, "one temporal step")
        _check(self.patches.dtype == np.uint8, "patches", self.patches.dtype, "uint8")
        expected = (t * h * w, PATCH_BYTES[self.kind])
        _check(self.patches.shape == expected, "shape of patches", self.patches.shape, f"{expected}")

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
    """One row for the engine. `input_ids` holds one placeholder id for each visual token already."""

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
    """With `stop`: the end token, or the stop string, that ended it."""


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """Where the media of a prompt lie, and the positions of its tokens (see mrope.py)."""

    positions: npt.NDArray[np.int32]
    """[3, tokens]: temporal, height, width."""
    delta: int
    """Position of an output token is its index plus this, on all three axes."""
    spans: tuple[tuple[int, int], ...]
    """Token range [start, stop) of each medium, in order."""


class SequenceStatus(Enum):
    WAITING = "waiting"
    """In the queue: never run, or preempted and to be computed again."""
    PREFILLING = "prefilling"
    """Owns blocks; part of its prompt is still to be computed."""
    RUNNING = "running"
    """Decoding."""
    FINISHED = "finished"


_MASK = 2**64 - 1


def _mix(value: int) -> int:
    """splitmix64: a cheap integer hash, so that a draw depends on nothing but its coordinates."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform_draw(seed: int, index: int, step: int) -> float:
    """The number in [0, 1) that chooses token `step` of sample `index`; the batch has no say in it."""
    mixed = _mix(_mix(_mix(seed & _MASK) ^ index) ^ step)
    return (mixed >> 11) * 2.0**-53


@dataclass(eq=False)
class Sequence:
    """One sample on its way: the facts; everything else is a property.

        prompt tokens ................ | output tokens ......... | in flight
        0            num_prompt_tokens   num_tokens

    `num_computed` tokens have keys and values in the cache (or are about to, in the pass that runs).
    In flight are tokens that the device has chosen and the host has not read yet.
    """

    request: Request
    index: int
    seed: int
    layout: PromptLayout | None = None
    status: SequenceStatus = SequenceStatus.WAITING
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_computed: int = 0
    num_in_flight: int = 0
    block_table: list[int] = field(default_factory=list)
    row: int = -1
    """Its place in the runner's per-sequence tensors while it owns blocks."""
    num_preemptions: int = 0
    is_ordered: bool = False
    """Whether the scheduler has put it in its place among the last that wait."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: RowError | None = None

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.input_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens the host knows: prompt and output."""
        return self.num_prompt_tokens + len(self.output_ids)

    @property
    def num_tokens_with_in_flight(self) -> int:
        return self.num_tokens + self.num_in_flight

    @property
    def max_num_tokens(self) -> int:
        """Tokens that may ever need a place in the cache; the last token chosen is never fed back."""
        return self.num_prompt_tokens + self.sampling.max_tokens - 1

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def has_budget(self) -> bool:
        """Whether another token may be asked for, counting those in flight."""
        return len(self.output_ids) + self.num_in_flight < self.sampling.max_tokens

    def positions(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Three-axis positions [3, stop - start]; output tokens continue where the prompt ended."""
        assert self.layout is not None
        prompt = self.layout.positions[:, start:stop]
        if stop <= self.num_prompt_tokens:
            return prompt
        first = max(start, self.num_prompt_tokens)
        output = np.arange(first, stop, dtype=np.int32) + np.int32(self.layout.delta)
        return np.concatenate([prompt, np.broadcast_to(output, (3, len(output)))], axis=1)

    def draw(self, step: int) -> float:
        return uniform_draw(self.seed, self.index, step)

    def known_ids(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Token ids [start, stop) of prompt and output."""
        prompt = self.request.input_ids[start:stop]
        if stop <= self.num_prompt_tokens:
            return prompt
        first = max(0, start - self.num_prompt_tokens)
        output = np.asarray(self.output_ids[first : stop - self.num_prompt_tokens], dtype=np.int32)
        return np.concatenate([prompt, output]) if len(prompt) else output

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        assert not self.is_finished, f"sequence {self.request.request_id}/{self.index} finished twice"
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.status = SequenceStatus.FINISHED

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
        )


def error_completions(request: Request, error: RowError) -> list[Completion]:
    """A request that can't be answered still gives its n completions."""
    return [
        Completion(request.request_id, index, (), "error", () if request.sampling.logprobs else None, error)
        for index in range(request.sampling.n)
    ]


def repeats_endlessly(token_ids: SequenceOf[int], *, min_repeats: int = 8, max_period: int = 64) -> bool:
    """Whether the end is one phrase of up to `max_period` tokens, `min_repeats` times and 32 tokens or more.

    Looks only at the end, so it is cheap enough to ask after every token: periods are tried where the
    last token occurred before.
    """
    length = len(token_ids)
    for period in range(1, min(max_period, length // min_repeats) + 1):
        if token_ids[-1 - period] != token_ids[-1]:
            continue
        span = max(period * min_repeats, 32)
        if span > length:
            continue
        start = length - span
        if all(token_ids[i] == token_ids[i + period] for i in range(start, length - period)):
            return True
    return False
