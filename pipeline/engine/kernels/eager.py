"""The operations between matrix products and attention, in plain torch: the interface, and the reference for fused.py.

Every operation rounds where transformers' does, so that greedy tokens agree. A result may share memory with the
arguments, and an implementation may overwrite `hidden`, `qkv` and `x`: callers use the results only.

    N packed tokens or patches   H query heads   K kv heads   D head_dim   C hidden size
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pipeline.engine.kv_cache import KVCache

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class EagerKernels:
    name = "eager"

    def add_layer_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, norm: torch.nn.LayerNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual sum [N, C], and its norm; without a delta the sum is `hidden`."""
        hidden = hidden if delta is None else hidden + delta
        return hidden, norm(hidden)

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with an RMSNorm, which is computed in float32, rounded, and then multiplied by the weight."""
        hidden = hidden if delta is None else hidden + delta
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return hidden, weight * normed.to(hidden.dtype)

    def rotate_vision(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> QKV:
        """q, k, v [N, H, D] of qkv [N, 3, H, D]; q and k rotated in float32 and rounded once. cos and sin
        [N, 1, 1, D] have two equal halves."""
        rotated = rotate(qkv[:, :2].float(), cos, sin).to(qkv.dtype)
        return rotated[:, 0], rotated[:, 1], qkv[:, 2]

    def norm_heads(self, qkv: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """qkv [N, H + 2K, D] with an RMSNorm over each of the first heads, as many as `weight` [H + K, D] has."""
        heads = qkv[:, : len(weight)]
        wide = heads.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        heads.copy_(weight * normed.to(qkv.dtype))
        return qkv

    def rotate_and_cache(
        self,
        qkv: torch.Tensor,  # [N, H + 2K, D]
        cos: torch.Tensor,  # [N, 1, D], of two equal halves
        sin: torch.Tensor,
        num_heads: int,
        cache: KVCache,
        layer: int,
        slots: torch.Tensor,  # [N]
    ) -> QKV:
        """q [N, H, D], k and v [N, K, D]; q and k rotated in the model's dtype, k and v written to the cache."""
        num_rotated = (num_heads + qkv.shape[1]) // 2
        rotated = rotate(qkv[:, :num_rotated], cos, sin)
        q, k, v = rotated[:, :num_heads], rotated[:, num_heads:], qkv[:, num_rotated:]
        cache.write(layer, k, v, slots)
        return q, k, v

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)

    def silu_times_up(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[N, 2M] -> [N, M]"""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


EAGER = EagerKernels()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of the last axis of x [N, ..., D] by the angles of cos and sin [N, ..., D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
