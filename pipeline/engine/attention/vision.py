"""Vision attention on GPUs with several kernels for it: the fastest is found by measurement while the engine loads.

    varlen   one call for all frames, of any sizes: the backend's own kernel, and FlashAttention 3 where it is installed
    cudnn    one call for a batch of equal frames; the others are left to the varlen kernel

cuDNN plans each shape of batch for about 0.4 s before its first call. So a frame length gets plans only when much of
it has been seen, and batches of it are powers of two.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch

from pipeline.engine.attention.fastest import Seconds, by_speed, hopper_kernels, seconds_by_events
from pipeline.engine.attention.interface import AttentionBackend
from pipeline.engine.attention.packed import FrameAttention, PackedAttention, Varlen, VarlenFrames, pack
from pipeline.engine.device import is_alive, is_out_of_memory

log = logging.getLogger(__name__)

MIN_WORK = 8e9
"""Sum of the squared lengths of all frames of one length from which on cuDNN takes them: 270 frames of 1024x1024, which
take FlashAttention 2 several seconds on an H200. Five plans take two."""

MIN_LENGTH = 512
"""Patches of the shortest frame that cuDNN gets. Runs of shorter ones, such as windows, would take many small calls."""

FRAME_PATCHES = 74 * 74
"""Of an image of 1024x1024, with which kernels are measured."""


class Part(NamedTuple):
    """Neighbouring frames that one call computes."""

    lengths: list[int]
    is_batch: bool
    """All of one length, for cuDNN."""


class CudnnFrames(FrameAttention):
    name = "cudnn"

    def __init__(self, others: Varlen, *, is_trial: bool = False) -> None:
        """In a trial cuDNN takes all frames, and what it raises is not caught."""
        self._others = others
        self._is_trial = is_trial
        self._work: Counter[int] = Counter()
        """Of each frame length so far."""
        self._refused: set[int] = set()

    def begin(self, frame_lengths: Sequence[int], device: torch.device) -> None:
        self._parts = [
            (part, sum(part.lengths), None if part.is_batch else pack(part.lengths, device))
            for part in self.split(frame_lengths)
        ]

    def split(self, frame_lengths: Sequence[int]) -> list[Part]:
        """The pass in parts, in its order. Counts its frames as seen."""
        for length in frame_lengths:
            self._work[length] += length**2
        parts: list[Part] = []
        for takes, frames in groupby(frame_lengths, self._takes):
            parts += [Part(batch, True) for batch in _batches(list(frames))] if takes else [Part(list(frames), False)]
        return parts

    def _takes(self, length: int) -> bool:
        is_worth_it = length >= MIN_LENGTH and self._work[length] >= MIN_WORK
        return self._is_trial or (is_worth_it and length not in self._refused)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        sizes = [size for _, size, _ in self._parts]
        inputs = zip(self._parts, *(torch.split(each, sizes) for each in (q, k, v)), strict=True)
        found = [
            self._batch(part.lengths, q, k, v) if frames is None else self._others(q, k, v, frames, frames, False)
            for (part, _, frames), q, k, v in inputs
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _batch(self, lengths: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        length = lengths[0]
        if length not in self._refused:
            try:
                return batched(q, k, v, len(lengths))
            except RuntimeError as error:  # no plan for this shape, for example
                if self._is_trial or is_out_of_memory(error) or not is_alive(q.device):
                    raise
                log.warning("cuDNN does not take frames of %d patches, so another kernel does: %s", length, error)
                self._refused.add(length)
        frames = pack(lengths, q.device)
        return self._others(q, k, v, frames, frames, False)


def _batches(frames: list[int]) -> Iterator[list[int]]:
    """Equal neighbours in powers of two, the largest first: of 11 equal frames 8, 2 and 1."""
    for length, run in groupby(frames):
        count = len(list(run))
        for bit in reversed(range(count.bit_length())):
            if count >> bit & 1:
                yield [length] * (1 << bit)


def batched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> torch.Tensor:
    """cuDNN over q, k, v [count * length, H, D]."""
    parts = (each.view(count, -1, *each.shape[1:]).transpose(1, 2) for each in (q, k, v))
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(*parts, None, False, 0.0, False, False)[0]
    return out.transpose(1, 2).flatten(0, 1)


def candidates(own: Varlen, name: str, device: torch.device) -> list[FrameAttention]:
    """What may run on a device, the backend's own kernel first."""
    found: list[FrameAttention] = [VarlenFrames(name, own)]
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return found
    found += [VarlenFrames(other, kernel) for other, kernel in hopper_kernels(device).items()]
    if torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        found.append(CudnnFrames(own, is_trial=True))
    return found


def choose_vision(
    attention: AttentionBackend,
    *,
    max_patches: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: Seconds = seconds_by_events,
) -> None:
    """Let a backend use the kernel that is fastest for a full pass of large images."""
    attention = attention.for_vision
    if not isinstance(attention, PackedAttention):
        return
    tried = {each.name: each for each in candidates(attention.varlen, attention.name, device)}
    if len(tried) == 1:
        return
    length = min(FRAME_PATCHES, max_patches)
    lengths = [length] * (max_patches // length)
    qkv = torch.randn(sum(lengths), 3, num_heads, head_dim, dtype=dtype, device=device).unbind(1)
    for each in tried.values():
        each.begin(lengths, device)
    times = by_speed("vision", {name: partial(each, *qkv) for name, each in tried.items()}, seconds)
    attention.kernel_ms["vision"] = times
    fastest, *others = (tried[name] for name in times)
    if isinstance(fastest, CudnnFrames):
        # Frames of a length that is rare never get to cuDNN, so the next fastest computes them.
        fastest = CudnnFrames(next(each.kernel for each in others if isinstance(each, VarlenFrames)))
    attention.frames = fastest
