"""Attention by our own code for the vector instructions of x86 CPUs (simd/attention.c).

Keys and values of prompts are read out of the cache, block by block, so that a later chunk is nothing special. Knows
where tensors lie; not how the numbers are computed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from pipeline.engine.attention.interface import AttentionBackend, DecodeInfo, PrefillInfo
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.simd.library import SimdLibrary

MAX_HEAD_DIM = 256
LOG2_E = 1.4426950408889634
MIN_PART = 96
"""Queries of a part: for fewer it costs too much to pack the keys again."""
ALIGNMENT = 64


class _Pass(ctypes.Structure):
    """`Pass` of attention.c, which says what each field is."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "kv_row", "kv_head")),
        *((name, ctypes.c_void_p) for name in ("query_ends", "key_counts", "blocks")),
        *((name, ctypes.c_int64) for name in ("blocks_per_row", "block_size", "rows", "kv_heads", "group", "dim")),
        *((name, ctypes.c_int64) for name in ("causal", "parts")),
        ("scale", ctypes.c_float),
        ("workspace", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("workspace_size", "packed_keys", "threads_started", "tasks_started")),
    )


Ints = npt.NDArray[np.int32]


@dataclass
class _Rows:
    """Where the queries and keys of each row of a pass lie."""

    query_ends: Ints
    """[rows + 1]"""
    key_counts: Ints
    """[rows]"""
    blocks: Ints
    """[rows, widest]: the first key of each block."""
    block_size: int
    workspace: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    """For all layers of the pass; it goes with the next pass of the kind, since with long rows it is large."""

    @property
    def most_keys(self) -> int:
        return int(self.key_counts.max())

    @property
    def most_queries(self) -> int:
        return int(np.diff(self.query_ends).max())

    def workspace_of(self, num_bytes: int) -> int:
        """The address of one of this size at least."""
        if len(self.workspace) < num_bytes + ALIGNMENT:
            self.workspace = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
        return -(-self.workspace.data_ptr() // ALIGNMENT) * ALIGNMENT


def _ends(lengths: Sequence[int]) -> Ints:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


class SimdAttention(AttentionBackend):
    name = "simd"
    block_size = 32

    def __init__(self, library: SimdLibrary) -> None:
        self._library = library

    def begin_vision(self, frame_lengths: Sequence[int], device: torch.device) -> None:
        ends = _ends(frame_lengths)
        lengths = np.asarray(frame_lengths, dtype=np.int32)
        self._frames = _Rows(ends, lengths, ends[:-1, None], block_size=int(lengths.max()))

    def vision(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self._attend(self._frames, q, k, v, causal=False)

    def begin_prefill(self, info: PrefillInfo, cache: KVCache) -> None:
        totals = [start + length for start, length in zip(info.starts, info.lengths, strict=True)]
        tables = np.zeros((len(totals), max(map(len, info.tables))), dtype=np.int32)
        for row, table in enumerate(info.tables):
            tables[row, : len(table)] = table
        self._prompts = _Rows(
            _ends(info.lengths), np.asarray(totals, dtype=np.int32), tables * cache.block_size, cache.block_size
        )

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        return self._attend_cache(self._prompts, q, cache, layer)

    def begin_decode(self, info: DecodeInfo, cache: KVCache) -> None:
        rows = len(info.lengths)
        blocks = np.ascontiguousarray(info.tables.numpy()) * np.int32(cache.block_size)
        self._decoded = _Rows(np.arange(rows + 1, dtype=np.int32), info.lengths.numpy(), blocks, cache.block_size)

    def decode(self, q: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        return self._attend_cache(self._decoded, q, cache, layer)

    def _attend_cache(self, rows: _Rows, q: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        return self._attend(rows, q, cache.keys[layer].flatten(0, 1), cache.values[layer].flatten(0, 1), causal=True)

    def _attend(self, rows: _Rows, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
        """q [queries, H, D], k and v [keys, K, D] -> [queries, H, D]"""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if k.stride() != v.stride():
            k, v = k.contiguous(), v.contiguous()
        (_, heads, dim), kv_heads = q.shape, k.shape[1]
        if q.dtype != self._library.dtype or dim > MAX_HEAD_DIM or dim % 2:
            raise RuntimeError(f"simd attention of {self._library.dtype} does not take heads of {dim} in {q.dtype}")
        out = q.new_empty(q.shape)
        threads = torch.get_num_threads()
        most_queries = rows.most_queries * (heads // kv_heads)
        packed_keys, workspace_size = self._library.workspace(rows.most_keys, most_queries, dim)
        tasks = len(rows.key_counts) * kv_heads
        wanted = -(-4 * threads // tasks)  # so that no thread waits long for the last ones
        found = _Pass(
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            out=out.data_ptr(),
            q_row=q.stride(0),
            q_head=q.stride(1),
            kv_row=k.stride(0),
            kv_head=k.stride(1),
            query_ends=rows.query_ends.ctypes.data,
            key_counts=rows.key_counts.ctypes.data,
            blocks=rows.blocks.ctypes.data,
            blocks_per_row=rows.blocks.shape[1],
            block_size=rows.block_size,
            rows=len(rows.key_counts),
            kv_heads=kv_heads,
            group=heads // kv_heads,
            dim=dim,
            causal=causal,
            parts=min(wanted, max(1, most_queries // MIN_PART)),
            scale=dim**-0.5 * LOG2_E,
            workspace=rows.workspace_of(threads * workspace_size),
            workspace_size=workspace_size,
            packed_keys=packed_keys,
        )
        self._library.call("attention", ctypes.byref(found), threads=threads)
        return out
