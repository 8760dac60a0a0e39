"""The compiled kernels on a GPU: the fused ones and decode attention against torch, and the kernels of vision attention
against each other."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend

from pipeline.engine.attention.fastest import MAX_DIFFERENCE, by_speed, hopper_kernels, seconds_by_events
from pipeline.engine.attention.interface import DecodeInfo
from pipeline.engine.attention.packed import PackedAttention, pack
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.attention.torch_varlen import TorchAttention
from pipeline.engine.attention.vision import candidates, choose_vision
from pipeline.engine.kernels.eager import EAGER
from pipeline.engine.kernels.fused import FusedKernels
from pipeline.engine.kernels.sample import Widths, run_every_operation
from pipeline.engine.kv_cache import KVCache

pytestmark = pytest.mark.gpu

SHAPES = {
    "2b": Widths(1536, 12, 2, 128, 8960, 16, 80, 5120),
    "7b": Widths(3584, 28, 4, 128, 18944, 16, 80, 5120),
    "qwen2.5-vl-7b": Widths(3584, 28, 4, 128, 18944, 16, 80, 3420),
    "qwen3-vl-2b": Widths(2048, 16, 8, 128, 6144, 16, 64, 4096),
    "qwen3-vl-8b": Widths(4096, 32, 8, 128, 12288, 16, 72, 4304),
    "odd": Widths(67, heads=6, kv_heads=2, head_dim=10, mlp=257, vision_heads=3, vision_head_dim=10, vision_mlp=1030),
}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_but_the_norms_are_bit_equal_and_these_within_rounding(shape: str, gap: int, dtype: torch.dtype) -> None:
    found, expected = (
        run_every_operation(kernels, SHAPES[shape], torch.device("cuda"), dtype, num_rows=33, gap=gap)
        for kernels in (FusedKernels(), EAGER)
    )
    assert found.keys() == expected.keys()
    different = {}
    for name in expected:
        if "norm" in name:
            epsilon = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(found[name], expected[name], rtol=epsilon, atol=4 * epsilon)
        else:
            mine, other = (part[name].contiguous().view(BITS[dtype]) for part in (found, expected))
            different[name] = int((mine != other).sum())
    assert not any(different.values()), different


WINDOWS = [64] * 9 + [16] + [64] * 9 + [16]


@pytest.mark.parametrize("head_dim", [64, 72, 80])
@pytest.mark.parametrize(
    "lengths", [[5476] * 3, [1024] * 7 + [300, 300, 17], WINDOWS * 60], ids=["large", "mixed", "windows"]
)
def test_every_kernel_of_vision_attention_computes_the_same(lengths: list[int], head_dim: int) -> None:
    backend = TorchAttention()
    tried = candidates(backend.varlen, backend.name, torch.device("cuda"))
    qkv = torch.randn(sum(lengths), 3, 16, head_dim, device="cuda", dtype=torch.bfloat16).unbind(1)
    for each in tried:
        each.begin(lengths, qkv[0].device)
    results = [each(*qkv).float() for each in tried]
    for each, result in zip(tried, results, strict=True):
        difference = float((result - results[0]).norm() / results[0].norm())
        assert difference <= MAX_DIFFERENCE / 2, each.name
    times = by_speed("vision", {each.name: partial(each, *qkv) for each in tried}, seconds_by_events)
    assert times.keys() == {each.name for each in tried} and all(took > 0 for took in times.values())


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (28, 4), (16, 8)])
def test_every_kernel_of_prefill_attention_computes_the_same(heads: int, kv_heads: int) -> None:
    backend, device = TorchAttention(), torch.device("cuda")
    lengths, pasts = [1, 300, 64, 1025, 7], [0, 17, 640, 0, 2000]
    queries, keys = pack(lengths, device), pack([a + b for a, b in zip(lengths, pasts, strict=True)], device)
    q = torch.randn(sum(lengths), heads, 128, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(sum(lengths + pasts), kv_heads, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    expected = backend.varlen(q, k, v, queries, keys, True).float()
    for name, kernel in hopper_kernels(device).items():
        found = kernel(q, k, v, queries, keys, True).float()
        assert float((found - expected).norm() / expected.norm()) <= MAX_DIFFERENCE / 2, name


def test_a_backend_gets_one_of_the_kernels_that_run_here() -> None:
    backend: PackedAttention = TorchAttention()
    device = torch.device("cuda")
    names = [each.name for each in candidates(backend.varlen, backend.name, device)]
    choose_vision(backend, max_patches=16384, num_heads=16, head_dim=80, dtype=torch.bfloat16, device=device)
    assert backend.vision_name in names


def test_torch_s_own_attention_does_not_plan_every_shape() -> None:
    q = torch.randn(1, 4, 33, 64, device="cuda", dtype=torch.bfloat16)
    assert SDPBackend(torch._fused_sdp_choice(q, q, q)) == SDPBackend.FLASH_ATTENTION


@pytest.mark.parametrize(("num_rows", "length"), [(1, 30_000), (16, 4000), (256, 700)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (28, 4)])
def test_the_decode_kernel_equals_sdpa_at_all_lengths(num_rows: int, length: int, heads: int, kv_heads: int) -> None:
    device, size = torch.device("cuda"), TorchAttention.block_size
    width = -(-length // size)
    cache = KVCache(
        [device],
        num_blocks=num_rows * width,
        block_size=size,
        num_kv_heads=kv_heads,
        head_dim=128,
        dtype=torch.bfloat16,
    )
    cache.storage[device].normal_()
    lengths = [max(1, length - 37 * row) for row in reversed(range(num_rows))]
    tables = torch.randperm(num_rows * width, device=device).to(torch.int32).view(num_rows, width)
    slots = torch.zeros(num_rows, dtype=torch.int64, device=device)
    info = DecodeInfo(slots, torch.tensor(lengths, dtype=torch.int32, device=device), tables, lengths)
    q = torch.randn(num_rows, heads, 128, dtype=torch.bfloat16, device=device)
    results = []
    for backend in (TorchAttention(), SdpaAttention()):
        backend.begin_decode(info, cache)
        results.append(backend.decode(q, cache, 0))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
