# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads the kernels' arguments itself; they have no Python types.
"""Decode attention over the paged cache: one query token of each row against all keys and values of the row.

The keys of a row are cut into parts of equal length, so that a long row among short ones, or a batch of few rows, keeps
a whole GPU busy. A program handles one part and one kv head. It loops over the blocks of its part and keeps a running
maximum and sum (online softmax). The query heads that share the kv head are the rows of one matrix, padded to 16
because matrix instructions need that many. A second kernel combines the parts of rows that have several.

How many parts there may be depends on the batch size alone; how long they are is computed on the device. So a CUDA
graph can hold all of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from pipeline.engine.kernels.launch import Launch, launch

MORE_PROGRAMS = 1024
"""Programs besides one for each row and kv head: about eight for each multiprocessor of a large GPU."""

MIN_PART_BLOCKS = 4
"""Of a part: shorter ones would take longer to combine than they save."""

COMBINED_AT_ONCE = 8


class Parts(NamedTuple):
    """How the keys of all rows are cut, on the device."""

    size: torch.Tensor
    """[1] int32: blocks of every part but the last of a row."""
    ends: torch.Tensor
    """[R + 1] int32: 0, then how many parts the rows have up to each one."""
    rows: torch.Tensor
    """[most parts] int32: the row of each part; R where there is none."""


def cut(lengths: torch.Tensor, *, block_size: int, num_kv_heads: int) -> Parts:
    """Parts for rows of these lengths [R]: once a pass, for all its layers. Nothing waits for the device."""
    num_more = -(-MORE_PROGRAMS // num_kv_heads)
    blocks = (lengths + (block_size - 1)) // block_size
    # Each row has one part more than its blocks fill at most, so the parts are never more than R + num_more.
    size = ((blocks.sum(dtype=torch.int32) + (num_more - 1)) // num_more).clamp_(min=MIN_PART_BLOCKS).view(1)
    ends = F.pad(((blocks + (size - 1)) // size).cumsum(0, dtype=torch.int32), (1, 0))
    numbers = torch.arange(len(lengths) + num_more, dtype=torch.int32, device=lengths.device)
    return Parts(size, ends, torch.searchsorted(ends[1:], numbers, right=True, out_int32=True))


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    parts_ptr,
    log_sum_ptr,
    tables_ptr,
    lengths_ptr,
    size_ptr,
    ends_ptr,
    rows_ptr,
    num_rows,
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
    part = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(rows_ptr + part).to(tl.int64)
    if row < num_rows:
        first_part = tl.load(ends_ptr + row)
        is_only = tl.load(ends_ptr + row + 1) - first_part == 1
        length = tl.load(lengths_ptr + row)
        part_size = tl.load(size_ptr) * block_size
        start = (part - first_part) * part_size
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
        out = out / total[:, None]
        heads = group * tl.num_programs(1)
        if is_only:
            tl.store(out_ptr + row * heads * head_dim + q_offset, out.to(out_ptr.dtype.element_ty), mask=q_mask)
        else:
            target = part.to(tl.int64) * heads
            tl.store(parts_ptr + target * head_dim + q_offset, out, mask=q_mask)
            tl.store(log_sum_ptr + target + head * group + g, best + tl.log(total), mask=g < group)


@triton.jit
def _combine(
    parts_ptr,
    log_sum_ptr,
    out_ptr,
    ends_ptr,
    at_once: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
):
    """The mean of a row's parts, weighted with the sums of their exponentials; nothing where it has only one."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    start = tl.load(ends_ptr + row)
    stop = tl.load(ends_ptr + row + 1)
    if stop - start > 1:
        d = tl.arange(0, padded_dim)
        best = -float("inf")
        total = 0.0
        out = tl.zeros([padded_dim], tl.float32)
        for first in range(start, stop, at_once):
            part = first + tl.arange(0, at_once)
            place = part.to(tl.int64) * heads + head
            log_sum = tl.load(log_sum_ptr + place, mask=part < stop, other=-float("inf"))
            mask = (part[:, None] < stop) & (d[None, :] < head_dim)
            parts = tl.load(parts_ptr + place[:, None] * head_dim + d[None, :], mask=mask, other=0.0)
            new_best = tl.maximum(best, tl.max(log_sum, 0))
            weights = tl.exp(log_sum - new_best)
            correction = tl.exp(best - new_best)
            total = total * correction + tl.sum(weights, 0)
            out = out * correction + tl.sum(parts * weights[:, None], 0)
            best = new_best
        target = out_ptr + (row.to(tl.int64) * heads + head) * head_dim + d
        tl.store(target, (out / total).to(out_ptr.dtype.element_ty), mask=d < head_dim)


def paged_decode(
    q: torch.Tensor,  # [R, H, D]; rows may be any distance apart
    keys: torch.Tensor,  # [blocks, block_size, K, D]
    values: torch.Tensor,
    tables: torch.Tensor,  # [R, width] int32
    lengths: torch.Tensor,  # [R] int32, 1 or more
    parts: Parts,  # of `cut`
    *,
    launch: Launch = launch,
) -> torch.Tensor:
    num_rows, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    most = len(parts.rows)
    out = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    partial = torch.empty((most, num_heads, head_dim), dtype=torch.float32, device=q.device)
    log_sum = torch.empty((most, num_heads), dtype=torch.float32, device=q.device)
    launch(
        _attend,
        (most, num_kv_heads),
        q,
        keys,
        values,
        out,
        partial,
        log_sum,
        tables,
        lengths,
        *parts,
        num_rows,
        head_dim**-0.5,
        q.stride(0),
        tables.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        group=group,
        padded_group=max(16, triton.next_power_of_2(group)),
        head_dim=head_dim,
        padded_dim=padded_dim,
        block_size=block_size,
    )
    launch(
        _combine,
        (num_rows, num_heads),
        partial,
        log_sum,
        out,
        parts.ends,
        at_once=COMBINED_AT_ONCE,
        num_warps=1,  # most programs have nothing to combine, and many small ones end sooner
        head_dim=head_dim,
        padded_dim=padded_dim,
    )
    return out
