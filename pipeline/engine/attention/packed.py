"""What backends over packed sequences share: queries one after another with cumulative lengths, no padding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from pipeline.engine.attention.interface import AttentionBackend, DecodeInfo, PrefillInfo, cumulative, gather_context
from pipeline.engine.device import upload
from pipeline.engine.kv_cache import KVCache


class PackedAttention(AttentionBackend):
    """What flash backends share: packed queries with cumulative lengths. A subclass brings the kernels."""

    allows_graphs = True

    @abstractmethod
    def varlen(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ends_q: torch.Tensor,
        ends_k: torch.Tensor,
        longest_q: int,
        longest_k: int,
        *,
        causal: bool,
    ) -> torch.Tensor:
        """Packed q [N, H, D], k and v [M, K, D]; causal is aligned at the ends, so a past may precede."""

    def begin_vision(self, frame_lengths: Sequence[int], device: torch.device) -> None:
        self._ends = upload(cumulative(frame_lengths), device)
        self._longest = max(frame_lengths)

    def vision(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.varlen(q, k, v, self._ends, self._ends, self._longest, self._longest, causal=False)

    def begin_prefill(self, info: PrefillInfo, cache: KVCache) -> None:
        device = info.slots.device
        totals = [start + length for start, length in zip(info.starts, info.lengths, strict=True)]
        self._ends_q, self._ends_k = (upload(cumulative(lengths), device) for lengths in (info.lengths, totals))
        self._longest_q, self._longest_k = max(info.lengths), max(totals)
        self._lengths = info.lengths
        self._pasts = [
            (total, upload(np.asarray(table, dtype=np.int32), device)) if start else None
            for total, start, table in zip(totals, info.starts, info.tables, strict=True)
        ]

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        if any(past is not None for past in self._pasts):
            k, v = self._with_past(k, v, cache, layer)
        return self.varlen(q, k, v, self._ends_q, self._ends_k, self._longest_q, self._longest_k, causal=True)

    def _with_past(
        self, k: torch.Tensor, v: torch.Tensor, cache: KVCache, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed keys and values in which later chunks are preceded by what the cache holds of them."""
        keys, values, first = [], [], 0
        for length, past in zip(self._lengths, self._pasts, strict=True):
            part = (k[first : first + length], v[first : first + length])
            if past is not None:
                part = gather_context(cache, layer, past[1], past[0])
            keys.append(part[0])
            values.append(part[1])
            first += length
        return torch.cat(keys), torch.cat(values)

    def begin_decode(self, info: DecodeInfo, cache: KVCache) -> None:
        self._decode = info
