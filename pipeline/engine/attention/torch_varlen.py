"""Attention for NVIDIA GPUs without the flash-attn package: torch's own flash kernels, and Triton for decode.

torch's built-in flash attention takes packed sequences but no paged cache, so the decode kernel is our own
(kernels/paged_decode.py).
"""

from __future__ import annotations

import torch

from pipeline.engine.attention.interface import DecodeInfo
from pipeline.engine.attention.packed import PackedAttention, Packing
from pipeline.engine.kernels.paged_decode import cut, paged_decode
from pipeline.engine.kv_cache import KVCache


class TorchAttention(PackedAttention):
    name = "torch"
    block_size = 64

    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Packing, keys: Packing, causal: bool
    ) -> torch.Tensor:
        # The operator under torch.nn.attention.varlen, whose Python signature changes between releases.
        out: torch.Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, queries.ends, keys.ends, queries.longest, keys.longest, 0.0, causal, False
        )[0]
        return out

    def begin_decode(self, info: DecodeInfo, cache: KVCache) -> None:
        super().begin_decode(info, cache)
        block_size, num_kv_heads = cache.keys[0].shape[1:3]
        self._parts = cut(info.lengths, block_size=block_size, num_kv_heads=num_kv_heads)

    def decode(self, q: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        info = self._decode
        return paged_decode(q, cache.keys[layer], cache.values[layer], info.tables, info.lengths, self._parts)
