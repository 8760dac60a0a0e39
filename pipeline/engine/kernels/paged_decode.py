"""A Triton kernel: one query token of each row against its keys and values in the paged cache.

    program (row, kv head):   for each block of the row's table:   scores = q k^T   online softmax   out += p v

The G query heads of a kv head are the rows of one small matrix, padded to 16 as matrix instructions want.
Shapes depend on no row's length, so the kernel can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tables_ptr,
    lengths_ptr,
    scale,
    q_stride,
    table_stride,
    block_stride,
    token_stride,
    head_stride,
    group: tl.constexpr,
    padded_group: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_size: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(lengths_ptr + row)
    g = tl.arange(0, padded_group)
    d = tl.arange(0, padded_dim)
    n = tl.arange(0, block_size)
    q_mask = (g[:, None] < group) & (d[None, :] < head_dim)
    q_offset = row * q_stride + (head * group + g[:, None]) * head_dim + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=q_mask, other=0.0)
    best = tl.full([padded_group], -float("inf"), tl.float32)
    total = tl.zeros([padded_group], tl.float32)
    out = tl.zeros([padded_group, padded_dim], tl.float32)
    for first in range(0, length, block_size):
        block = tl.load(tables_ptr + row * table_stride + first // block_size).to(tl.int64)
        place = block * block_stride + n[:, None] * token_stride + head * head_stride + d[None, :]
        seen = first + n < length
        kv_mask = seen[:, None] & (d[None, :] < head_dim)
        k = tl.load(k_ptr + place, mask=kv_mask, other=0.0)
        v = tl.load(v_ptr + place, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - new_best[:, None])
        correction = tl.exp(best - new_best)
        total = total * correction + tl.sum(weights, 1)
        out = out * correction[:, None] + tl.dot(weights.to(v.dtype), v)
        best = new_best
    out = out / total[:, None]
    tl.store(out_ptr + q_offset, out.to(out_ptr.dtype.element_ty), mask=q_mask)


def paged_decode(
    q: torch.Tensor,  # [R, H, D]
    keys: torch.Tensor,  # [blocks, block_size, K, D]
    values: torch.Tensor,
    tables: torch.Tensor,  # [R, width] int32
    lengths: torch.Tensor,  # [R] int32, 1 or more
) -> torch.Tensor:
    num_rows, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    q = q.contiguous()
    out = torch.empty_like(q)
    kernel: Any = _kernel
    kernel[(num_rows, num_kv_heads)](
        q,
        keys,
        values,
        out,
        tables,
        lengths,
        head_dim**-0.5,
        q.stride(0),
        tables.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        group=group,
        padded_group=max(16, triton.next_power_of_2(group)),
        head_dim=head_dim,
        padded_dim=max(16, triton.next_power_of_2(head_dim)),
        block_size=block_size,
    )
    return out
