"""Each attention backend against attention written out in float64; on a CPU that is sdpa."""

from __future__ import annotations

import pytest
import torch

from pipeline.engine.attention.interface import DecodeInfo, PrefillInfo
from pipeline.engine.attention.sdpa import SdpaAttention, _similar
from pipeline.engine.kv_cache import KVCache

HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 16, 4


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """q [n, H, D], k and v [m, K, D] -> [n, H, D]; causal aligned at the ends."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
    if causal:
        n, m = scores.shape[1:]
        hidden = torch.arange(m)[None] > torch.arange(n)[:, None] + m - n
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).float()


def make_cache(num_blocks: int = 64) -> KVCache:
    return KVCache(
        [torch.device("cpu")],
        num_blocks=num_blocks,
        block_size=BLOCK,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
    )


def slots_of(table: list[int], start: int, stop: int) -> torch.Tensor:
    return torch.tensor([table[i // BLOCK] * BLOCK + i % BLOCK for i in range(start, stop)])


def fill(cache: KVCache, lengths: list[int]) -> tuple[list[list[int]], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Random pasts of these lengths in scattered blocks; their tables and contents."""
    free = torch.randperm(cache.num_blocks).tolist()
    tables, contents = [], []
    for length in lengths:
        table = [free.pop() for _ in range(-(-length // BLOCK))]
        k, v = torch.randn(length, KV_HEADS, DIM), torch.randn(length, KV_HEADS, DIM)
        cache.write(0, k, v, slots_of(table, 0, length))
        tables.append(table)
        contents.append((k, v))
    return tables, contents


@pytest.mark.parametrize("frames", [[7], [4, 4, 4], [9, 3, 3, 12]])
def test_vision_stays_within_a_frame(frames: list[int]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, sum(frames), HEADS, DIM).unbind(0)
    backend = SdpaAttention()
    backend.begin_vision(frames, torch.device("cpu"))
    expected = [
        written_out(*parts, causal=False)
        for parts in zip(q.split(frames), k.split(frames), v.split(frames), strict=True)
    ]
    torch.testing.assert_close(backend.vision(q, k, v), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_prefill_sees_its_own_past_in_the_batch_and_in_the_cache() -> None:
    torch.manual_seed(0)
    cache, lengths, starts = make_cache(), [5, 9, 1], [0, 6, 11]
    tables, contents = fill(cache, [start + n for start, n in zip(starts, lengths, strict=True)])
    fresh = [(k[start:], v[start:]) for (k, v), start in zip(contents, starts, strict=True)]
    q = torch.randn(sum(lengths), HEADS, DIM)
    backend = SdpaAttention()
    slots = torch.cat([slots_of(t, s, s + n) for t, s, n in zip(tables, starts, lengths, strict=True)])
    backend.begin_prefill(PrefillInfo(lengths, starts, tables, slots), cache)
    k, v = (torch.cat(parts) for parts in zip(*fresh, strict=True))
    expected = [written_out(part, *past, causal=True) for part, past in zip(q.split(lengths), contents, strict=True)]
    got = backend.prefill(q, k, v, cache, 0)
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[1], [4, 4], [3, 8, 9, 30], [1, 2, 200]])
def test_decode_sees_all_of_its_row_and_nothing_of_others(lengths: list[int]) -> None:
    torch.manual_seed(0)
    cache = make_cache(80)
    cache.storage[torch.device("cpu")].fill_(1e4)  # what other rows left behind must not show
    tables, contents = fill(cache, lengths)
    widest = max(map(len, tables))
    padded = torch.tensor([table + [0] * (widest - len(table)) for table in tables], dtype=torch.int32)
    q = torch.randn(len(lengths), HEADS, DIM)
    backend = SdpaAttention()
    info = DecodeInfo(torch.empty(0), torch.tensor(lengths, dtype=torch.int32), padded, lengths)
    backend.begin_decode(info, cache)
    expected = [written_out(q[i : i + 1], *past, causal=True) for i, past in enumerate(contents)]
    torch.testing.assert_close(backend.decode(q, cache, 0), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_rows_of_like_length_are_padded_together_and_a_long_one_apart() -> None:
    assert _similar([10, 10, 11, 12]) == [(0, 4)]
    assert _similar([10] * 30 + [500]) == [(0, 30), (30, 31)]


def test_a_fresh_cache_holds_zeros_and_copies_blocks_whole() -> None:
    cache = make_cache()
    assert not cache.storage[torch.device("cpu")].any()
    fill(cache, [BLOCK])
    source = int(cache.keys[0].flatten(1).any(1).nonzero()[0])
    cache.copy_blocks([(source, 63 if source != 63 else 62)])
    assert torch.equal(cache.keys[0][source], cache.keys[0][63 if source != 63 else 62])
