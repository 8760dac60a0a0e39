"""Vision attention on GPUs with several kernels for it: the fastest is found by measurement while the engine loads.

    varlen   one call for all frames, of any sizes: the backend's own kernel, and FlashAttention 3 where it is installed
    cudnn    one call for a batch of equal frames; the others are left to the varlen kernel

cuDNN plans each shape of batch for about 0.4 s before its first call. So a frame length gets plans only when much of
it has been seen, and batches of it are powers of two.
"""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from pipeline.engine.attention.interface import AttentionBackend
from pipeline.engine.attention.packed import FrameAttention, PackedAttention, Packing, Varlen, VarlenFrames, pack
from pipeline.engine.device import is_alive

log = logging.getLogger(__name__)

MIN_WORK = 8e9
"""Sum of the squared lengths of all frames of one length from which on cuDNN takes them: 270 frames of 1024x1024, which
take FlashAttention 2 several seconds on an H200. Five plans take two."""

MIN_LENGTH = 512
"""Patches of the shortest frame that cuDNN gets. Runs of shorter ones, such as windows, would take many small calls."""

FRAME_PATCHES = 74 * 74
"""Of an image of 1024x1024, with which kernels are measured."""

MAX_DIFFERENCE = 0.02
"""Between the results of two kernels, as a share of their norm. Rounding to bfloat16 explains less than half of it."""


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
            self._batch(part.lengths, q, k, v) if frames is None else self._others(q, k, v, frames)
            for (part, _, frames), q, k, v in inputs
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _batch(self, lengths: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        length = lengths[0]
        if length not in self._refused:
            try:
                return batched(q, k, v, len(lengths))
            except RuntimeError as error:  # no plan for this shape, for example
                if self._is_trial or isinstance(error, torch.OutOfMemoryError) or not is_alive(q.device):
                    raise
                log.warning("cuDNN does not take frames of %d patches, so another kernel does: %s", length, error)
                self._refused.add(length)
        return self._others(q, k, v, pack(lengths, q.device))


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


def flash_attention_3() -> Varlen | None:
    """FlashAttention 3 from whichever package has it; it runs on Hopper only."""
    for package in ("fa3_fwd_interface", "flash_attn_interface"):
        try:
            kernel: Any = importlib.import_module(package).flash_attn_varlen_func
        except ImportError:
            continue
        except Exception as error:  # a package of another torch or CUDA may raise anything while it loads
            log.warning("vision attention: %s can't be used: %s: %s", package, type(error).__name__, error)
            continue

        def varlen(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, frames: Packing, kernel: Any = kernel
        ) -> torch.Tensor:
            out = kernel(
                q,
                k,
                v,
                cu_seqlens_q=frames.ends,
                cu_seqlens_k=frames.ends,
                max_seqlen_q=frames.longest,
                max_seqlen_k=frames.longest,
                causal=False,
            )
            result: torch.Tensor = out[0] if isinstance(out, tuple) else out  # some releases add the logarithms
            return result

        return varlen
    return None


def candidates(own: Varlen, name: str, device: torch.device) -> list[FrameAttention]:
    """What may run on a device, the backend's own kernel first."""
    found: list[FrameAttention] = [VarlenFrames(name, own)]
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return found
    if torch.cuda.get_device_capability(device) == (9, 0) and (kernel := flash_attention_3()) is not None:
        found.append(VarlenFrames("fa3", kernel))
    if torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        found.append(CudnnFrames(own, is_trial=True))
    return found


def fastest(
    tried: Sequence[FrameAttention],
    frame_lengths: Sequence[int],
    qkv: Sequence[torch.Tensor],
    seconds: Callable[[Callable[[], object]], float],
) -> tuple[FrameAttention, dict[str, float]]:
    """The fastest, and the seconds of each. All run twice: first to plan and to be compared, then on the clock.

    The first one is the reference. Others that raise or compute other numbers are left out, with one warning each.
    """
    expected: torch.Tensor | None = None
    times: dict[str, float] = {}
    for each in tried:
        try:
            each.begin(frame_lengths, qkv[0].device)
            found = each(*qkv)
            if expected is None:
                expected = found
            difference = float((found.float() - expected.float()).norm() / expected.float().norm())
            if not difference <= MAX_DIFFERENCE:  # also where it is NaN
                raise ArithmeticError(
                    f"its result differs from that of {tried[0].name} by {difference:.2g} of its norm"
                )
            del found
            times[each.name] = seconds(lambda each=each: each(*qkv))  # type: ignore[misc]
        except Exception as error:
            if each is tried[0] or not is_alive(qkv[0].device):
                raise
            log.warning("vision attention: %s does not work here: %s: %s", each.name, type(error).__name__, error)
    return min((each for each in tried if each.name in times), key=lambda each: times[each.name]), times


def seconds_by_events(run: Callable[[], object]) -> float:
    """Of a call on the current device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def choose_vision(
    attention: AttentionBackend,
    *,
    max_patches: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: Callable[[Callable[[], object]], float] = seconds_by_events,
) -> None:
    """Let a backend use the kernel that is fastest for a full pass of large images."""
    attention = attention.for_vision
    if not isinstance(attention, PackedAttention):
        return
    own = attention.within_frames
    tried = candidates(own, attention.name, device)
    if len(tried) == 1:
        return
    length = min(FRAME_PATCHES, max_patches)
    lengths = [length] * (max_patches // length)
    qkv = torch.randn(sum(lengths), 3, num_heads, head_dim, dtype=dtype, device=device).unbind(1)
    chosen, times = fastest(tried, lengths, qkv, seconds)
    log.info("vision attention: %s; milliseconds: %s", chosen.name, {each: 1e3 * took for each, took in times.items()})
    if isinstance(chosen, CudnnFrames):
        # Frames of a length that is rare never get to cuDNN, so the next fastest computes them.
        others = min(
            (each for each in tried if isinstance(each, VarlenFrames) and each.name in times),
            key=lambda each: times[each.name],
        )
        chosen = CudnnFrames(others.kernel)
    attention.frames = chosen
