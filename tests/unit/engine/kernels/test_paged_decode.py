"""The Triton decode kernel, run by Triton's interpreter where there is no GPU, against sdpa."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip(
    "triton", reason="needs triton, which comes with torch on CUDA: `make test` on such a machine runs it"
)


def release(package: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version(package))[:2])


@pytest.fixture(autouse=True)
def _needs_an_interpreter_that_works() -> None:
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("Triton's interpreter needs Triton 3.7 or numpy below 2.4: it calls int() on an array")


SCRIPT = """
import torch
from pipeline.engine.attention.interface import DecodeInfo
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.kernels.paged_decode import paged_decode

for block_size, head_dim, group, kv_heads in ((16, 32, 3, 2), (64, 128, 6, 2), (16, 80, 7, 1)):
    torch.manual_seed(0)
    cache = KVCache([torch.device("cpu")], num_blocks=20, block_size=block_size, num_kv_heads=kv_heads,
                    head_dim=head_dim, dtype=torch.float32)
    cache.storage[torch.device("cpu")].normal_()
    lengths = [1, block_size, 2 * block_size + 3, 7]
    tables = torch.tensor([[5, 0, 0], [2, 0, 0], [9, 8, 13], [4, 0, 0]], dtype=torch.int32)
    q = torch.randn(4, kv_heads * group, head_dim)
    info = DecodeInfo(torch.zeros(4), torch.tensor(lengths, dtype=torch.int32), tables, lengths)
    sdpa = SdpaAttention()
    sdpa.begin_decode(info, cache)
    ours = paged_decode(q, cache.keys[0], cache.values[0], tables, info.lengths)
    torch.testing.assert_close(ours, sdpa.decode(q, cache, 0), rtol=1e-4, atol=1e-5)
"""


def test_the_kernel_in_the_interpreter_equals_sdpa() -> None:
    # The interpreter is chosen when triton is imported, hence a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[4]
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, env=environment, cwd=root, timeout=200)
