"""Attention by torch's scaled_dot_product_attention on any device in any dtype: the reference for the others.

On CPUs that simd.py does not know it is also the fastest. Query heads that share a kv head are folded into the query
length or expanded with stride 0, so keys and values are never copied per head. Decode rows are grouped by length, so
that short rows are not padded to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.engine.attention.interface import AttentionBackend, DecodeInfo, PrefillInfo, gather_context
from pipeline.engine.dense import needs_float32_matmul
from pipeline.engine.device import upload
from pipeline.engine.kv_cache import KVCache


@dataclass
class _Group:
    """Decode rows [start, stop), padded together to `width` blocks."""

    start: int
    stop: int
    width: int
    blocks: torch.Tensor  # [(stop - start) * width]
    mask: torch.Tensor | None  # [rows, 1, 1, width * block_size], 0 or -inf


class SdpaAttention(AttentionBackend):
    name = "sdpa"
    block_size = 32

    def begin_vision(self, frame_lengths: Sequence[int], device: torch.device) -> None:
        self._frames = _runs(frame_lengths)

    def vision(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found = []
        start = 0
        for length, count in self._frames:
            stop = start + length * count
            # Neighbouring frames of one size are one batch: [count, H, length, D]. Copied, because a CPU's kernel reads
            # each head's rows many times: 1.05 to 1.2 times faster.
            shape = (count, length, *q.shape[1:])
            parts = (x[start:stop].view(shape).transpose(1, 2).contiguous() for x in (q, k, v))
            found.append(_sdpa(*parts).transpose(1, 2).flatten(0, 1))
            start = stop
        return found[0] if len(found) == 1 else torch.cat(found)

    def begin_prefill(self, info: PrefillInfo, cache: KVCache) -> None:
        device = info.slots.device
        self._prompts: list[tuple[int, int, torch.Tensor | None, torch.Tensor | None]] = []
        for length, start, table in zip(info.lengths, info.starts, info.tables, strict=True):
            if start == 0:
                self._prompts.append((length, 0, None, None))
                continue
            # A later chunk: its token i sees the `start` tokens in the cache and the chunk up to itself.
            seen = torch.arange(start + length, device=device)[None]
            mask = seen <= torch.arange(start, start + length, device=device)[:, None]
            blocks = upload(np.asarray(table, dtype=np.int64), device)
            self._prompts.append((length, start, blocks, mask))

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        out = torch.empty_like(q)
        first = 0
        for length, start, blocks, mask in self._prompts:
            rows = slice(first, first + length)
            keys, values = k[rows], v[rows]
            if blocks is not None:
                keys, values = gather_context(cache, layer, blocks, start + length)
            out[rows] = _causal(q[rows], keys, values, mask)
            first += length
        return out

    def begin_decode(self, info: DecodeInfo, cache: KVCache) -> None:
        size, device = cache.block_size, info.tables.device
        widths = [-(-length // size) for length in info.host_lengths]
        self._groups = []
        for start, stop in _similar(widths):
            width = max(widths[start:stop])
            blocks = info.tables[start:stop, :width].reshape(-1)
            lengths = info.lengths[start:stop]
            mask = None
            if any(length != width * size for length in info.host_lengths[start:stop]):
                hidden = torch.arange(width * size, device=device)[None] >= lengths[:, None]
                mask = torch.zeros(hidden.shape, device=device).masked_fill(hidden, -torch.inf)
                mask = mask[:, None, None, :]
            self._groups.append(_Group(start, stop, width, blocks, mask))

    def decode(self, q: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        num_kv_heads, head_dim = cache.keys[layer].shape[-2:]
        out = torch.empty_like(q)
        for group in self._groups:
            rows = group.stop - group.start
            # Heads that share their keys become queries of one head: [rows, K, H / K, D].
            queries = q[group.start : group.stop].view(rows, num_kv_heads, -1, head_dim)
            keys, values = (
                part[layer]
                .index_select(0, group.blocks)
                .view(rows, group.width * cache.block_size, num_kv_heads, head_dim)
                .transpose(1, 2)
                for part in (cache.keys, cache.values)
            )
            attended = _sdpa(queries, keys, values, group.mask)
            out[group.start : group.stop] = attended.reshape(rows, -1, head_dim)
        return out


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, *, causal: bool = False
) -> torch.Tensor:
    dtype = q.dtype
    if needs_float32_matmul(q.device, dtype):
        q, k, v = q.float(), k.float(), v.float()
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).to(dtype)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """One prompt: q [n, H, D], k and v [m, K, D] -> [n, H, D]; without a mask n == m."""
    length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    queries = q.view(length, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [K, G, n, D]
    # Stride 0 over the group, instead of a copy for each head.
    keys, values = (x.transpose(0, 1)[:, None].expand(-1, group, -1, -1) for x in (k, v))
    attended = _sdpa(queries, keys, values, mask, causal=mask is None)
    return attended.permute(2, 0, 1, 3).reshape(length, num_heads, head_dim)


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """[5, 5, 7] -> [(5, 2), (7, 1)]"""
    return [(length, len(list(run))) for length, run in groupby(lengths)]


def _similar(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Groups [start, stop) of rows sorted by width, cut where padding to the widest would waste over a third.

    Each group costs one call per layer, so little waste is not worth a cut.
    """
    groups: list[tuple[int, int]] = []
    start = used = 0
    for stop, width in enumerate(widths):
        padded = width * (stop - start + 1)
        if stop > start and padded - (used + width) > max(64, padded // 3):
            groups.append((start, stop))
            start, used = stop, 0
        used += width
    groups.append((start, len(widths)))
    return groups
