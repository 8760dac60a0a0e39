"""Attention by the flash-attn package, for NVIDIA GPUs in bfloat16 or float16.

Decode uses `flash_attn_with_kvcache` with one query per row. The varlen kernel over a paged cache with split keys
gives wrong results in flash-attn 2, so it is never called that way; the past of a later chunk is gathered instead.
"""

from __future__ import annotations

import torch

from pipeline.engine.attention.packed import PackedAttention, Packing
from pipeline.engine.kv_cache import KVCache


class FlashAttention(PackedAttention):
    name = "flash"
    block_size = 256  # flash-attn 2 pages are multiples of 256

    def __init__(self) -> None:
        super().__init__()
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        self._varlen_func = flash_attn_varlen_func
        self._with_kvcache = flash_attn_with_kvcache

    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Packing, keys: Packing, causal: bool
    ) -> torch.Tensor:
        out: torch.Tensor = self._varlen_func(
            q, k, v, queries.ends, keys.ends, queries.longest, keys.longest, causal=causal
        )
        return out

    def decode(self, q: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        out: torch.Tensor = self._with_kvcache(
            q[:, None],
            cache.keys[layer],
            cache.values[layer],
            cache_seqlens=self._decode.lengths,
            block_table=self._decode.tables,
            causal=True,
        )
        return out[:, 0]
