"""The operations in eager.py by our own code for the vector instructions of x86 CPUs (simd/kernels.c), one pass each.

Values round where eager.py rounds them; sums are in another order, so results may differ in the last bit. `hidden`,
`qkv` and quick_gelu's `x` are overwritten.
"""

from __future__ import annotations

import torch

from pipeline.engine.kernels.eager import QKV, EagerKernels
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.simd.library import SimdLibrary


class SimdKernels(EagerKernels):
    name = "simd"

    def __init__(self, library: SimdLibrary) -> None:
        self._library = library

    def add_layer_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, norm: torch.nn.LayerNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if norm.bias is None or not self._takes(hidden, delta, norm.weight, norm.bias):  # no family has it so
            return super().add_layer_norm(hidden, delta, norm)
        return self._add_norm(hidden, delta, norm.weight, norm.bias, norm.eps)

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._takes(hidden, delta, weight):
            return super().add_rms_norm(hidden, delta, weight, eps)
        return self._add_norm(hidden, delta, weight, None, eps)

    def _takes(self, *tensors: torch.Tensor | None) -> bool:
        """Whether the C code reads what these hold: its own dtype, and columns side by side."""
        return all(x is None or (x.dtype == self._library.dtype and x.stride(-1) == 1) for x in tensors)

    def _add_norm(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, width = hidden.shape
        normed = hidden.new_empty(rows, width)
        self._library.call(
            "add_norm",
            hidden.data_ptr(),
            hidden.stride(0),
            None if delta is None else delta.data_ptr(),
            0 if delta is None else delta.stride(0),
            normed.data_ptr(),
            width,
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            rows,
            1,
            width,
            eps,
        )
        return hidden, normed

    def norm_heads(self, qkv: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if not (self._takes(qkv, weight) and weight.is_contiguous()):
            return super().norm_heads(qkv, weight, eps)
        heads, width = weight.shape
        x, stride = qkv.data_ptr(), qkv.stride(0)
        self._library.call(
            "add_norm", x, stride, None, 0, x, stride, weight.data_ptr(), None, len(qkv), heads, width, eps
        )
        return qkv

    def rotate_vision(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> QKV:
        rows, _, heads, width = qkv.shape
        angles = (cos.data_ptr(), sin.data_ptr(), cos.stride(0))
        self._library.call("rotate", qkv.data_ptr(), qkv.stride(0), *angles, rows, 2 * heads, width)
        return qkv[:, 0], qkv[:, 1], qkv[:, 2]

    def rotate_and_cache(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        num_heads: int,
        cache: KVCache,
        layer: int,
        slots: torch.Tensor,
    ) -> QKV:
        rows, all_heads, width = qkv.shape
        kv_heads = (all_heads - num_heads) // 2
        slots = cache.slots_on(qkv.device, slots)
        self._library.call(
            "rotate_and_cache",
            qkv.data_ptr(),
            qkv.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.stride(0),
            rows,
            num_heads + kv_heads,
            kv_heads,
            width,
            cache.keys[layer].data_ptr(),
            cache.values[layer].data_ptr(),
            slots.data_ptr(),
        )
        q, k, v = torch.split(qkv, [num_heads, kv_heads, kv_heads], dim=1)
        return q, k, v

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        self._library.call("quick_gelu", x.data_ptr(), x.stride(0), *x.shape)
        return x

    def silu_times_up(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self._library.call("silu_times_up", gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), width, rows, width)
        return out
