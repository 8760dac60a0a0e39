"""The decode kernel in Triton's interpreter, against sdpa."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.attention.interface import DecodeInfo
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.kernels import paged_decode as module
from pipeline.engine.kernels.paged_decode import cut, paged_decode
from pipeline.engine.kv_cache import KVCache

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("programs", "head_dim", "group", "kv_heads"),
    [
        pytest.param(1, 32, 3, 2, id="one part a row"),
        pytest.param(5, 32, 3, 2, id="long rows in parts"),
        pytest.param(1000, 80, 7, 1, id="a part for each block"),
    ],
)
def test_it_equals_sdpa_in_any_number_of_parts(
    monkeypatch: pytest.MonkeyPatch, programs: int, head_dim: int, group: int, kv_heads: int
) -> None:
    monkeypatch.setattr(module, "MORE_PROGRAMS", programs)
    monkeypatch.setattr(module, "MIN_PART_BLOCKS", 1)
    monkeypatch.setattr(module, "COMBINED_AT_ONCE", 2)
    block_size = 16
    torch.manual_seed(0)
    cache = KVCache(
        [CPU], num_blocks=20, block_size=block_size, num_kv_heads=kv_heads, head_dim=head_dim, dtype=torch.float32
    )
    cache.storage[CPU].normal_()
    lengths = [1, block_size, 6 * block_size + 3, 7]
    tables = torch.zeros(4, 7, dtype=torch.int32)
    tables[:, 0] = torch.tensor([5, 2, 9, 4])
    tables[2, 1:] = torch.tensor([8, 13, 1, 19, 0, 7])
    q = torch.randn(4, kv_heads * group + 2, head_dim)[:, 1:-1]  # rows apart, as in a packed qkv
    info = DecodeInfo(torch.zeros(4), torch.tensor(lengths, dtype=torch.int32), tables, lengths)
    sdpa = SdpaAttention()
    sdpa.begin_decode(info, cache)
    parts = cut(info.lengths, block_size=block_size, num_kv_heads=kv_heads)
    ours = paged_decode(q, cache.keys[0], cache.values[0], tables, info.lengths, parts)
    torch.testing.assert_close(ours, sdpa.decode(q.contiguous(), cache, 0), rtol=1e-4, atol=1e-5)


def parts_of(*lengths: int, num_kv_heads: int = 2) -> list[int]:
    """How many each row has; that `cut` gives each one its row, in order, is checked."""
    parts = cut(torch.tensor(lengths, dtype=torch.int32), block_size=64, num_kv_heads=num_kv_heads)
    counts = parts.ends.diff().tolist()
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    assert parts.rows.tolist() == rows + [len(lengths)] * (len(parts.rows) - len(rows))
    for length, count in zip(lengths, counts, strict=True):
        assert (count - 1) * int(parts.size) * 64 < length <= count * int(parts.size) * 64
    return counts


def test_a_long_row_is_cut_where_rows_together_would_wait_for_it() -> None:
    assert parts_of(*[300] * 512) == [1] * 512
    assert parts_of(*[300] * 64, 24_000) == [2] * 64 + [94], "small batches have programs to spare"
    assert parts_of(*[1450] * 512, 24_000) == [1] * 512 + [16]
    assert parts_of(30_000) == [118]
    assert parts_of(1, 256, 257) == [1, 1, 2]


@given(lengths=st.lists(st.integers(1, 40_000), min_size=1, max_size=40), num_kv_heads=st.integers(1, 8))
def test_every_part_has_a_place(lengths: list[int], num_kv_heads: int) -> None:
    parts_of(*lengths, num_kv_heads=num_kv_heads)
