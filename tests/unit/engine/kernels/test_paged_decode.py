"""The decode kernel in Triton's interpreter, against sdpa."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.engine.attention.interface import DecodeInfo
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.kernels import paged_decode as module
from pipeline.engine.kernels.paged_decode import count_parts, paged_decode
from pipeline.engine.kv_cache import KVCache

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("programs", "head_dim", "group", "kv_heads"),
    [
        pytest.param(0, 32, 3, 2, id="one part"),
        pytest.param(25, 32, 3, 2, id="three parts"),
        pytest.param(1000, 80, 7, 1, id="a part for each block"),
    ],
)
def test_it_equals_sdpa_in_any_number_of_parts(
    monkeypatch: pytest.MonkeyPatch, programs: int, head_dim: int, group: int, kv_heads: int
) -> None:
    monkeypatch.setattr(module, "WANTED_PROGRAMS", programs)
    block_size = 16
    torch.manual_seed(0)
    cache = KVCache(
        [CPU], num_blocks=20, block_size=block_size, num_kv_heads=kv_heads, head_dim=head_dim, dtype=torch.float32
    )
    cache.storage[CPU].normal_()
    lengths = [1, block_size, 3 * block_size + 3, 7]
    tables = torch.tensor([[5, 0, 0, 0], [2, 0, 0, 0], [9, 8, 13, 1], [4, 0, 0, 0]], dtype=torch.int32)
    q = torch.randn(4, kv_heads * group + 2, head_dim)[:, 1:-1]  # rows apart, as in a packed qkv
    info = DecodeInfo(torch.zeros(4), torch.tensor(lengths, dtype=torch.int32), tables, lengths)
    sdpa = SdpaAttention()
    sdpa.begin_decode(info, cache)
    with np.errstate(divide="ignore"):  # the logarithm of an empty part's sum
        ours = paged_decode(q, cache.keys[0], cache.values[0], tables, info.lengths)
    torch.testing.assert_close(ours, sdpa.decode(q.contiguous(), cache, 0), rtol=1e-4, atol=1e-5)


def test_keys_are_split_where_a_batch_is_too_small_to_fill_a_gpu() -> None:
    assert count_parts(16, 2, 512) == 8
    assert count_parts(1, 2, 512) == 16
    assert count_parts(1, 2, 3) == 3
    assert count_parts(256, 4, 512) == 1
