"""Each attention backend of a CPU against attention written out in float64: sdpa, and simd with each set of
instructions that this CPU has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.attention.interface import AttentionBackend, DecodeInfo, PrefillInfo
from pipeline.engine.attention.sdpa import SdpaAttention, _similar
from pipeline.engine.attention.simd import SimdAttention
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.simd.library import INSTRUCTION_SETS, SimdLibrary
from tests.unit.engine.simd.instructions import parameter

BLOCK = 16
CPU = torch.device("cpu")
TOLERANCE: dict[torch.dtype, Any] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.02},
}


def _simd(dtype: torch.dtype, instructions: tuple[str, ...]) -> AttentionBackend:
    return SimdAttention(SimdLibrary(dtype, instructions))


Case = tuple[torch.dtype, Callable[[], AttentionBackend]]
every_backend = pytest.mark.parametrize(
    "case",
    [
        pytest.param((torch.float32, SdpaAttention), id="sdpa"),
        pytest.param((torch.bfloat16, SdpaAttention), id="sdpa bfloat16"),
        *(parameter(*one, (one[0], partial(_simd, *one))) for one in INSTRUCTION_SETS),
    ],
)


class Sizes(NamedTuple):
    seed: int
    kv_heads: int
    group: int
    dim: int
    spread: float
    """Of the queries: with a large one a query sees almost one key alone."""

    def queries(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return (self.spread * torch.randn(count, self.kv_heads * self.group, self.dim)).to(dtype)


SIZES = st.builds(
    Sizes,
    seed=st.integers(0, 2**16),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    dim=st.sampled_from([2, 16, 64, 72, 80, 128, 130, 256]),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
)
few = settings(max_examples=40, deadline=None)


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


def make_cache(num_blocks: int, kv_heads: int, dim: int, dtype: torch.dtype) -> KVCache:
    cache = KVCache([CPU], num_blocks=num_blocks, block_size=BLOCK, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype)
    cache.storage[CPU].fill_(1e4)  # what other rows left behind must not show
    return cache


def slots_of(table: list[int], start: int, stop: int) -> torch.Tensor:
    return torch.tensor([table[i // BLOCK] * BLOCK + i % BLOCK for i in range(start, stop)])


def fill(cache: KVCache, lengths: list[int]) -> tuple[list[list[int]], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Random pasts of these lengths in scattered blocks; their tables and contents."""
    free = torch.randperm(cache.num_blocks).tolist()
    tables, contents = [], []
    _, _, kv_heads, dim = cache.keys[0].shape
    for length in lengths:
        table = [free.pop() for _ in range(-(-length // BLOCK))]
        k, v = (torch.randn(length, kv_heads, dim).to(cache.keys[0].dtype) for _ in range(2))
        cache.write(0, k, v, slots_of(table, 0, length))
        tables.append(table)
        contents.append((k, v))
    return tables, contents


def blocks_for(lengths: list[int]) -> int:
    return sum(-(-length // BLOCK) for length in lengths)


@every_backend
@few
@given(sizes=SIZES, frames=st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_vision_stays_within_a_frame(case: Case, sizes: Sizes, frames: list[int]) -> None:
    dtype, make = case
    torch.manual_seed(sizes.seed)
    one = sizes._replace(spread=1.0)
    q, k, v = torch.stack([each.queries(sum(frames), dtype) for each in (sizes, one, one)], dim=1).unbind(1)
    backend = make()
    backend.begin_vision(frames, CPU)
    expected = [
        written_out(*parts, causal=False)
        for parts in zip(q.split(frames), k.split(frames), v.split(frames), strict=True)
    ]
    torch.testing.assert_close(backend.vision(q, k, v).float(), torch.cat(expected), **TOLERANCE[dtype])


@every_backend
@few
@given(sizes=SIZES, rows=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=4))
def test_prefill_sees_its_own_past_in_the_batch_and_in_the_cache(
    case: Case, sizes: Sizes, rows: list[tuple[int, int]]
) -> None:
    dtype, make = case
    torch.manual_seed(sizes.seed)
    lengths, starts = [length for length, _ in rows], [start for _, start in rows]
    totals = [sum(row) for row in rows]
    cache = make_cache(blocks_for(totals), sizes.kv_heads, sizes.dim, dtype)
    tables, contents = fill(cache, totals)
    fresh = [(k[start:], v[start:]) for (k, v), start in zip(contents, starts, strict=True)]
    q = sizes.queries(sum(lengths), dtype)
    backend = make()
    slots = torch.cat([slots_of(t, s, s + n) for t, s, n in zip(tables, starts, lengths, strict=True)])
    backend.begin_prefill(PrefillInfo(lengths, starts, tables, slots), cache)
    k, v = (torch.cat(parts) for parts in zip(*fresh, strict=True))
    expected = [written_out(part, *past, causal=True) for part, past in zip(q.split(lengths), contents, strict=True)]
    got = backend.prefill(q, k, v, cache, 0)
    torch.testing.assert_close(got.float(), torch.cat(expected), **TOLERANCE[dtype])


@every_backend
@few
@given(sizes=SIZES, lengths=st.lists(st.integers(1, 600), min_size=1, max_size=6))
def test_decode_sees_all_of_its_row_and_nothing_of_others(case: Case, sizes: Sizes, lengths: list[int]) -> None:
    dtype, make = case
    torch.manual_seed(sizes.seed)
    lengths = sorted(lengths)
    cache = make_cache(blocks_for(lengths), sizes.kv_heads, sizes.dim, dtype)
    tables, contents = fill(cache, lengths)
    widest = max(map(len, tables))
    padded = torch.tensor([table + [0] * (widest - len(table)) for table in tables], dtype=torch.int32)
    q = sizes.queries(len(lengths), dtype)
    backend = make()
    info = DecodeInfo(torch.empty(0), torch.tensor(lengths, dtype=torch.int32), padded, lengths)
    backend.begin_decode(info, cache)
    expected = [written_out(q[i : i + 1], *past, causal=True) for i, past in enumerate(contents)]
    got = backend.decode(q, cache, 0)
    torch.testing.assert_close(got.float(), torch.cat(expected), **TOLERANCE[dtype])


@every_backend
def test_threads_share_the_work_and_change_nothing(case: Case) -> None:
    dtype, make = case
    torch.manual_seed(0)
    frames = [700, 1, 40]
    q, k, v = torch.randn(3, sum(frames), 2, 80).to(dtype).unbind(0)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            backend = make()
            backend.begin_vision(frames, CPU)
            found.append(backend.vision(q, k, v))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0 if backend.name == "simd" else 0.01)


def test_rows_of_like_length_are_padded_together_and_a_long_one_apart() -> None:
    assert _similar([10, 10, 11, 12]) == [(0, 4)]
    assert _similar([10] * 30 + [500]) == [(0, 30), (30, 31)]


def test_a_fresh_cache_holds_zeros_and_copies_blocks_whole() -> None:
    cache = KVCache([CPU], num_blocks=64, block_size=BLOCK, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    assert not cache.storage[CPU].any()
    fill(cache, [BLOCK])
    source = int(cache.keys[0].flatten(1).any(1).nonzero()[0])
    cache.copy_blocks([(source, 63 if source != 63 else 62)])
    assert torch.equal(cache.keys[0][source], cache.keys[0][63 if source != 63 else 62])
