# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads the kernels' arguments itself; they have no Python types.
"""Decode attention over the paged cache: one query token of each row against all keys and values of the row.

A program handles one row, one kv head and one part of the row's keys. It loops over the blocks of its part and keeps a
running maximum and sum (online softmax). The query heads that share the kv head are the rows of one matrix, padded to
16 because matrix instructions need that many.

A small batch has too few rows and heads to keep a GPU busy, so the keys of each row are split into several parts. A
second kernel then combines the parts. The number of parts depends on the batch size and not on the rows' lengths, so a
CUDA graph can hold both kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipeline.engine.kernels.launch import Launch, launch

WANTED_PROGRAMS = 256
"""About two for each multiprocessor of a large GPU."""

MAX_PARTS = 16


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    log_sum_ptr,
    tables_ptr,
    lengths_ptr,
    scale,
    q_stride,
    table_stride,
    block_stride,
    token_stride,
    head_stride,
    num_parts: tl.constexpr,
    group: tl.constexpr,
    padded_group: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_size: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    part_size = tl.cdiv(tl.cdiv(length, block_size), num_parts) * block_size
    start = part * part_size
    stop = tl.minimum(start + part_size, length)
    g = tl.arange(0, padded_group)
    d = tl.arange(0, padded_dim)
    n = tl.arange(0, block_size)
    q_mask = (g[:, None] < group) & (d[None, :] < head_dim)
    q_offset = (head * group + g[:, None]) * head_dim + d[None, :]
    q = tl.load(q_ptr + row * q_stride + q_offset, mask=q_mask, other=0.0)
    best = tl.full([padded_group], -float("inf"), tl.float32)
    total = tl.zeros([padded_group], tl.float32)
    out = tl.zeros([padded_group, padded_dim], tl.float32)
    for first in range(start, stop, block_size):
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
    # A short row leaves later parts empty: their result is 0, and their weight exp(-inf).
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    heads = group * tl.num_programs(1)
    target = row * num_parts + part
    tl.store(out_ptr + target * heads * head_dim + q_offset, out.to(out_ptr.dtype.element_ty), mask=q_mask)
    if num_parts > 1:
        log_sum = best + tl.log(total)
        tl.store(log_sum_ptr + target * heads + head * group + g, log_sum, mask=g < group)


@triton.jit
def _combine(
    parts_ptr,
    log_sum_ptr,
    out_ptr,
    num_parts: tl.constexpr,
    padded_parts: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
):
    """The mean of the parts' results, weighted with the sums of their exponentials."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    part = tl.arange(0, padded_parts)
    d = tl.arange(0, padded_dim)
    place = (row * num_parts + part) * heads + head
    log_sum = tl.load(log_sum_ptr + place, mask=part < num_parts, other=-float("inf"))
    weights = tl.exp(log_sum - tl.max(log_sum, 0))
    mask = (part[:, None] < num_parts) & (d[None, :] < head_dim)
    parts = tl.load(parts_ptr + place[:, None] * head_dim + d[None, :], mask=mask, other=0.0)
    out = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out_ptr + (row * heads + head) * head_dim + d, out.to(out_ptr.dtype.element_ty), mask=d < head_dim)


def count_parts(num_rows: int, num_kv_heads: int, max_blocks: int) -> int:
    """Into how many parts the keys of a row are split: as many as fill a GPU, and no more than a row has blocks."""
    return max(1, min(WANTED_PROGRAMS // (num_rows * num_kv_heads), MAX_PARTS, max_blocks))


def paged_decode(
    q: torch.Tensor,  # [R, H, D]; rows may be any distance apart
    keys: torch.Tensor,  # [blocks, block_size, K, D]
    values: torch.Tensor,
    tables: torch.Tensor,  # [R, width] int32
    lengths: torch.Tensor,  # [R] int32, 1 or more
    *,
    launch: Launch = launch,
) -> torch.Tensor:
    num_rows, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    num_parts = count_parts(num_rows, num_kv_heads, tables.shape[1])
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    out = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    parts, log_sum = out, None
    if num_parts > 1:
        parts = torch.empty((num_rows, num_parts, num_heads, head_dim), dtype=torch.float32, device=q.device)
        log_sum = torch.empty((num_rows, num_parts, num_heads), dtype=torch.float32, device=q.device)
    launch(
        _attend,
        (num_rows, num_kv_heads, num_parts),
        q,
        keys,
        values,
        parts,
        log_sum,
        tables,
        lengths,
        head_dim**-0.5,
        q.stride(0),
        tables.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        num_parts=num_parts,
        group=group,
        padded_group=max(16, triton.next_power_of_2(group)),
        head_dim=head_dim,
        padded_dim=padded_dim,
        block_size=block_size,
    )
    if num_parts > 1:
        launch(
            _combine,
            (num_rows, num_heads),
            parts,
            log_sum,
            out,
            num_parts=num_parts,
            padded_parts=triton.next_power_of_2(num_parts),
            head_dim=head_dim,
            padded_dim=padded_dim,
        )
    return out
