"""Every shape of attention once, on random inputs: for comparing two backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.engine.attention.interface import AttentionBackend, DecodeInfo, PrefillInfo
from pipeline.engine.device import upload
from pipeline.engine.kernels.sample import Widths
from pipeline.engine.kv_cache import KVCache

FRAMES = (300, 300, 17, 64, 1)
PASTS, PROMPTS = (0, 300, 0, 0), (40, 33, 7, 1)
"""Tokens of each prompt in the cache, and in the pass."""
CONTEXTS = (1, 7, 63, 64, 65, 256, 257, 333)
"""Lengths of decode rows, around the sizes of blocks."""


def run_every_shape(
    backend: AttentionBackend, widths: Widths, device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Results of vision, prefill and decode. The inputs depend neither on the backend nor on its block size."""
    generator = torch.Generator().manual_seed(0)

    def random(count: int, heads: int, head_dim: int) -> torch.Tensor:
        return torch.randn(count, heads, head_dim, generator=generator).to(device, dtype)

    def rows(lengths: Sequence[int]) -> _Rows:
        keys, values = (random(sum(lengths), widths.kv_heads, widths.head_dim) for _ in range(2))
        return _cached(keys, values, lengths, backend.block_size)

    backend.begin_vision(FRAMES, device)
    results = [backend.vision(*(random(sum(FRAMES), widths.vision_heads, widths.vision_head_dim) for _ in range(3)))]

    prompts = rows([past + length for past, length in zip(PASTS, PROMPTS, strict=True)])
    new = np.concatenate([np.arange(end - n, end) for end, n in zip(prompts.ends, PROMPTS, strict=True)])
    index = upload(new, device)
    info = PrefillInfo(list(PROMPTS), list(PASTS), prompts.tables, upload(prompts.slots[new], device))
    backend.begin_prefill(info, prompts.cache)
    k, v = prompts.keys.index_select(0, index), prompts.values.index_select(0, index)
    results.append(backend.prefill(random(len(new), widths.heads, widths.head_dim), k, v, prompts.cache, 0))

    contexts = rows(CONTEXTS)
    newest = contexts.ends - 1
    widest = max(map(len, contexts.tables))
    padded = np.asarray([table + [0] * (widest - len(table)) for table in contexts.tables], dtype=np.int32)
    backend.begin_decode(
        DecodeInfo(
            slots=upload(contexts.slots[newest], device),
            lengths=upload(np.asarray(CONTEXTS, dtype=np.int32), device),
            tables=upload(padded, device),
            host_lengths=CONTEXTS,
        ),
        contexts.cache,
    )
    # Queries that resemble the newest key look at that token almost alone, so a row that is cut short shows.
    newest_keys = contexts.keys.index_select(0, upload(newest, device))
    resembling = 2 * newest_keys.repeat_interleave(widths.heads // widths.kv_heads, dim=1)
    for q in (random(len(CONTEXTS), widths.heads, widths.head_dim), resembling):
        results.append(backend.decode(q, contexts.cache, 0))
    return results


class _Rows(NamedTuple):
    """Packed keys and values of some rows, also written to a cache."""

    keys: torch.Tensor
    values: torch.Tensor
    cache: KVCache
    tables: list[list[int]]
    slots: npt.NDArray[np.int64]
    """Of each packed token."""
    ends: npt.NDArray[np.int64]


def _cached(keys: torch.Tensor, values: torch.Tensor, lengths: Sequence[int], block_size: int) -> _Rows:
    """The rows in a cache of one layer that just holds them, in blocks from the end."""
    counts = [-(-length // block_size) for length in lengths]
    free = list(range(sum(counts)))
    tables = [[free.pop() for _ in range(count)] for count in counts]
    indices = [np.arange(length) for length in lengths]
    slots = np.concatenate(
        [
            np.asarray(table, dtype=np.int64)[index // block_size] * block_size + index % block_size
            for table, index in zip(tables, indices, strict=True)
        ]
    )
    cache = KVCache(
        [keys.device],
        num_blocks=sum(counts),
        block_size=block_size,
        num_kv_heads=keys.shape[1],
        head_dim=keys.shape[2],
        dtype=keys.dtype,
    )
    cache.write(0, keys, values, upload(slots, keys.device))
    return _Rows(keys, values, cache, tables, slots, np.cumsum(lengths))
