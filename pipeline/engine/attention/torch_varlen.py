"""Attention for NVIDIA GPUs without the flash-attn package: torch's own flash kernels, and Triton for decode.

torch's built-in flash attention takes packed sequences but no paged cache, so the decode kernel is our own
(kernels/paged_decode.py).
"""

from __future__ import annotations

import torch

from pipeline.engine.attention.packed import PackedAttention, Packing
from pipeline.engine.kernels.paged_decode import paged_decode
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

    def decode(self, q: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        return paged_decode(q, cache.keys[layer], cache.values[layer], self._decode.tables, self._decode.lengths)
