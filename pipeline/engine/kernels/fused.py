# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads the kernels' arguments itself; they have no Python types.
"""Triton kernels for the operations in eager.py: one launch each, and every tensor is read and written once.

A value is computed in float32 and rounded to the tensor's dtype wherever eager.py rounds it, and multiply-add is not
fused. So rotations, activations and residual sums are bit-equal to eager.py. The norms add up a row in another order,
so their results may differ in the last bit. `hidden`, `qkv` and quick_gelu's `x` are overwritten.

A program handles one row, or a block of one row's columns. Rows may be any distance apart; columns are contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from pipeline.engine.kernels.eager import QKV, EagerKernels
from pipeline.engine.kernels.launch import Launch, launch
from pipeline.engine.kv_cache import KVCache

EXACT = {"enable_fp_fusion": False}

if triton.knobs.runtime.interpret:

    @triton.jit
    def _exp(x):
        return tl.exp(x)

else:
    # CUDA's own expf, which torch's kernels call as well; tl.exp is less accurate. The interpreter has no libdevice.
    _exp = libdevice.exp


@triton.jit
def _rounded(x, pointer):
    """Round to the dtype that the pointer points to, and go on in float32."""
    return x.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def _sum(hidden_ptr, delta_ptr, delta_stride, row, column, mask):
    """hidden + delta of a row in float32; the rounded sum is stored in `hidden`."""
    hidden = tl.load(hidden_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + row * delta_stride + column, mask=mask, other=0.0).to(tl.float32)
        hidden = _rounded(hidden + delta, hidden_ptr)
        tl.store(hidden_ptr + column, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
    return hidden


@triton.jit
def _add_layer_norm(
    hidden_ptr,
    delta_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    hidden_stride,
    delta_stride,
    eps,
    width: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    mask = column < width
    x = _sum(hidden_ptr + row * hidden_stride, delta_ptr, delta_stride, row, column, mask)
    centred = tl.where(mask, x - tl.sum(x, axis=0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=mask).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=mask).to(tl.float32)
    out = centred * scale * weight + bias
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_rms_norm(
    hidden_ptr,
    delta_ptr,
    weight_ptr,
    out_ptr,
    hidden_stride,
    delta_stride,
    eps,
    width: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    mask = column < width
    x = _sum(hidden_ptr + row * hidden_stride, delta_ptr, delta_stride, row, column, mask)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=mask).to(tl.float32)
    out = weight * _rounded(x * scale, out_ptr)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_heads(
    qkv_ptr, weight_ptr, row_stride, num_heads, eps, width: tl.constexpr, heads: tl.constexpr, block: tl.constexpr
):
    head = tl.program_id(1) * heads + tl.arange(0, heads)[:, None]
    column = tl.arange(0, block)[None, :]
    mask = (head < num_heads) & (column < width)
    at = head * width + column
    qkv_ptr += tl.program_id(0).to(tl.int64) * row_stride
    x = tl.load(qkv_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)[:, None]
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out = weight * _rounded(x * scale, qkv_ptr)
    tl.store(qkv_ptr + at, out.to(qkv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(
    x_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    x_stride,
    angle_stride,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    half: tl.constexpr,
    block: tl.constexpr,
):
    """Rotate the query and key heads of a row in place, and write its keys and values to the cache.

    The products and their sum are rounded to the dtype of cos: the model's dtype in text, float32 in vision.
    """
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * block + tl.arange(0, block)
    head = index // half
    pair = index % half
    mask = head < num_heads + 2 * num_kv_heads
    is_rotated = head < num_heads + num_kv_heads
    place = x_ptr + row * x_stride + head * (2 * half) + pair
    first = tl.load(place, mask=mask).to(tl.float32)
    second = tl.load(place + half, mask=mask).to(tl.float32)
    cos = tl.load(cos_ptr + row * angle_stride + pair).to(tl.float32)
    sin = tl.load(sin_ptr + row * angle_stride + pair).to(tl.float32)
    turned_first = _rounded(first * cos, cos_ptr) - _rounded(second * sin, cos_ptr)
    turned_second = _rounded(second * cos, cos_ptr) + _rounded(first * sin, cos_ptr)
    first = tl.where(is_rotated, turned_first, first).to(x_ptr.dtype.element_ty)
    second = tl.where(is_rotated, turned_second, second).to(x_ptr.dtype.element_ty)
    tl.store(place, first, mask=is_rotated)
    tl.store(place + half, second, mask=is_rotated)
    if num_kv_heads > 0:
        cached = tl.load(slots_ptr + row) * (num_kv_heads * 2 * half) + pair
        key = keys_ptr + cached + (head - num_heads) * (2 * half)
        is_key = is_rotated & (head >= num_heads)
        tl.store(key, first, mask=is_key)
        tl.store(key + half, second, mask=is_key)
        value = values_ptr + cached + (head - num_heads - num_kv_heads) * (2 * half)
        is_value = mask & (head >= num_heads + num_kv_heads)
        tl.store(value, first, mask=is_value)
        tl.store(value + half, second, mask=is_value)


@triton.jit
def _quick_gelu(x_ptr, stride, width, block: tl.constexpr):
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < width
    place = x_ptr + tl.program_id(0).to(tl.int64) * stride + column
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    scaled = _rounded(1.702 * x, x_ptr)
    gate = _rounded(tl.div_rn(1.0, 1.0 + _exp(-scaled)), x_ptr)
    tl.store(place, (x * gate).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_times_up(gate_up_ptr, out_ptr, stride, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < width
    gate = tl.load(gate_up_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + width + column, mask=mask, other=0.0).to(tl.float32)
    silu = _rounded(tl.div_rn(gate, 1.0 + _exp(-gate)), out_ptr)
    tl.store(out_ptr + row * width + column, (silu * up).to(out_ptr.dtype.element_ty), mask=mask)


class FusedKernels(EagerKernels):
    name = "fused"

    def __init__(self, launch: Launch = launch) -> None:
        self._launch = launch

    def add_layer_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, norm: torch.nn.LayerNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._add_norm(_add_layer_norm, hidden, delta, (norm.weight, norm.bias), norm.eps)

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._add_norm(_add_rms_norm, hidden, delta, (weight,), eps)

    def _add_norm(
        self,
        kernel: Any,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        weights: tuple[torch.Tensor, ...],
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, width = hidden.shape
        out = torch.empty((num_rows, width), dtype=hidden.dtype, device=hidden.device)
        block = triton.next_power_of_2(width)
        self._launch(
            kernel,
            (num_rows,),
            hidden,
            delta,
            *weights,
            out,
            hidden.stride(0),
            0 if delta is None else delta.stride(0),
            eps,
            width=width,
            block=block,
            num_warps=min(max(block // 512, 1), 8),
            **EXACT,
        )
        return hidden, out

    def norm_heads(self, qkv: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        num_heads, width = weight.shape
        heads = 8
        self._launch(
            _norm_heads,
            (qkv.shape[0], triton.cdiv(num_heads, heads)),
            qkv,
            weight,
            qkv.stride(0),
            num_heads,
            eps,
            width=width,
            heads=heads,
            block=triton.next_power_of_2(width),
            num_warps=2,
            **EXACT,
        )
        return qkv

    def rotate_vision(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> QKV:
        self._rotate(qkv, cos, sin, (None, None, None), num_heads=2 * qkv.shape[2], num_kv_heads=0)
        q, k, v = qkv.unbind(1)
        return q, k, v

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
        num_kv_heads = (qkv.shape[1] - num_heads) // 2
        where = (cache.keys[layer], cache.values[layer], cache.slots_on(qkv.device, slots))
        self._rotate(qkv, cos, sin, where, num_heads=num_heads, num_kv_heads=num_kv_heads)
        q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        return q, k, v

    def _rotate(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        where: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
        *,
        num_heads: int,
        num_kv_heads: int,
    ) -> None:
        half, block = x.shape[-1] // 2, 512
        blocks = triton.cdiv((num_heads + 2 * num_kv_heads) * half, block)
        self._launch(
            _rotate,
            (x.shape[0], blocks),
            x,
            cos,
            sin,
            *where,
            x.stride(0),
            cos.stride(0),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            half=half,
            block=block,
            num_warps=2,
            **EXACT,
        )

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        num_rows, width = x.shape
        self._launch(_quick_gelu, (num_rows, triton.cdiv(width, 1024)), x, x.stride(0), width, block=1024, **EXACT)
        return x

    def silu_times_up(self, gate_up: torch.Tensor) -> torch.Tensor:
        num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
        grid = (num_rows, triton.cdiv(width, 1024))
        self._launch(_silu_times_up, grid, gate_up, out, gate_up.stride(0), width, block=1024, **EXACT)
        return out
