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
        hidden = hidden if delta is None else hidden.add_(delta)
        return hidden, norm(hidden)

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with an RMSNorm, which is computed in float32, rounded, and then multiplied by the weight."""
        hidden = hidden if delta is None else hidden.add_(delta)
        return hidden, _rms_norm(hidden, weight, eps)

    def rotate_vision(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> QKV:
        """q, k, v [N, H, D] of qkv [N, 3, H, D]; q and k rotated in float32 and rounded once. cos and sin
        [N, 1, 1, D] have two equal halves."""
        for rows in row_slices(qkv):
            q_and_k = qkv[rows, :2]
            q_and_k.copy_(rotate(q_and_k.float(), cos[rows], sin[rows]))
        return qkv[:, 0], qkv[:, 1], qkv[:, 2]

    def norm_heads(self, qkv: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """qkv [N, H + 2K, D] with an RMSNorm over each of the first heads, as many as `weight` [H + K, D] has."""
        heads = qkv[:, : len(weight)]
        heads.copy_(_rms_norm(heads, weight, eps))
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
        return torch.sigmoid(1.702 * x).mul_(x)

    def silu_times_up(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[N, 2M] -> [N, M]"""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


EAGER = EagerKernels()

ROWS_IN_CACHE = 512
"""Of an MLP or of q, k and v: their values between two operations fit the caches of a CPU."""


def row_slices(x: torch.Tensor) -> list[slice]:
    """Of x [N, ...] on a CPU, slices that stay in its caches; else one slice of all rows."""
    size = ROWS_IN_CACHE if x.device.type == "cpu" else len(x)
    return [slice(start, start + size) for start in range(0, len(x), size)]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of the last axis of x [N, ..., D] by angles whose cos and sin [N, ..., D] have two equal
    halves."""
    rotated, crossed = x * cos, x * sin
    (first, second), (sin_first, sin_second) = rotated.chunk(2, dim=-1), crossed.chunk(2, dim=-1)
    first.sub_(sin_second)
    second.add_(sin_first)
    return rotated


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
