"""What backends over packed sequences share: rows one after another with cumulative lengths, no padding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pipeline.engine.attention.interface import AttentionBackend, DecodeInfo, PrefillInfo, gather_context
from pipeline.engine.device import upload
from pipeline.engine.kv_cache import KVCache


class Packing(NamedTuple):
    """Where the rows of a packed tensor end."""

    ends: torch.Tensor
    """[0, l0, l0 + l1, ...] int32 on the device."""
    longest: int


def pack(lengths: Sequence[int], device: torch.device) -> Packing:
    return Packing(upload(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device), max(lengths))


Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packing, Packing, bool], torch.Tensor]
"""(q [N, H, D], k and v [M, K, D], where the rows of queries and of keys end, causal) -> [N, H, D]; causal is aligned
at the ends, so a past may precede."""


class NamedKernel(NamedTuple):
    name: str
    kernel: Varlen


class FrameAttention(ABC):
    """Attention in which every patch sees its own frame."""

    name: str

    @abstractmethod
    def begin(self, frame_lengths: Sequence[int], device: torch.device) -> None:
        """Prepare a vision pass, for all its layers."""

    @abstractmethod
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [N, H, D] -> [N, H, D]."""


class VarlenFrames(FrameAttention):
    """One call for all frames, of any sizes."""

    def __init__(self, name: str, kernel: Varlen) -> None:
        self.name = name
        self.kernel = kernel

    def begin(self, frame_lengths: Sequence[int], device: torch.device) -> None:
        self._frames = pack(frame_lengths, device)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.kernel(q, k, v, self._frames, self._frames, False)


class PackedAttention(AttentionBackend):
    """All but the kernels, which a subclass brings."""

    allows_graphs = True

    def __init__(self) -> None:
        self.frames: FrameAttention = VarlenFrames(self.name, self.varlen)
        """For vision; attention/vision.py may put a faster kernel here."""
        self.prompts = NamedKernel(self.name, self.varlen)
        """For prefill; attention/fastest.py may put a faster kernel here."""
        self._kernel_ms: dict[str, dict[str, float]] = {}

    @property
    def vision_name(self) -> str:
        return self.frames.name

    @property
    def prefill_name(self) -> str:
        return self.prompts.name

    @property
    def kernel_ms(self) -> dict[str, dict[str, float]]:
        return self._kernel_ms

    @abstractmethod
    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Packing, keys: Packing, causal: bool
    ) -> torch.Tensor:
        """The backend's own kernel: see `Varlen`."""

    def begin_vision(self, frame_lengths: Sequence[int], device: torch.device) -> None:
        self.frames.begin(frame_lengths, device)

    def vision(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.frames(q, k, v)

    def begin_prefill(self, info: PrefillInfo, cache: KVCache) -> None:
        device = info.slots.device
        totals = [start + length for start, length in zip(info.starts, info.lengths, strict=True)]
        self._queries, self._keys = pack(info.lengths, device), pack(totals, device)
        self._lengths = info.lengths
        self._pasts = [
            (total, upload(np.asarray(table, dtype=np.int32), device)) if start else None
            for total, start, table in zip(totals, info.starts, info.tables, strict=True)
        ]

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        if any(past is not None for past in self._pasts):
            k, v = self._with_past(k, v, cache, layer)
        return self.prompts.kernel(q, k, v, self._queries, self._keys, True)

    def _with_past(
        self, k: torch.Tensor, v: torch.Tensor, cache: KVCache, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed keys and values in which later chunks are preceded by their past from the cache."""
        parts = list(zip(torch.split(k, self._lengths), torch.split(v, self._lengths), strict=True))
        for row, past in enumerate(self._pasts):
            if past is not None:
                parts[row] = gather_context(cache, layer, past[1], past[0])
        return torch.cat([keys for keys, _ in parts]), torch.cat([values for _, values in parts])

    def begin_decode(self, info: DecodeInfo, cache: KVCache) -> None:
        self._decode = info
