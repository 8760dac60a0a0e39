"""Attention on this CPU: torch's own (sdpa) and ours (simd), in passes of the 2b shape.

    python -m jobs.benchmark attention
    python -m jobs.benchmark attention --dtype float32 --rounds 5

Operations count a score and its use as 4 per head's element, half of them where attention is causal; decode is in
bytes of keys and values. What a line compares runs in turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from jobs.benchmark.measure import command_line, print_result, time_in_turns
from pipeline.engine.attention.interface import AttentionBackend, DecodeInfo, PrefillInfo
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.attention.simd import SimdAttention
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.simd.c_library import compiler
from pipeline.engine.simd.library import INSTRUCTION_SETS, SimdLibrary, cpu_features
from pipeline.planning.roofline import SHAPES

CPU = torch.device("cpu")
SHAPE = SHAPES["2b"]
VISION_DIM = SHAPE.vision_width // SHAPE.vision_heads
MAX_DIFFERENCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}
Call = Callable[[], torch.Tensor]


class Pass(NamedTuple):
    """What is measured: rows of one length."""

    name: str
    length: int
    rows: int
    prepare: Callable[[AttentionBackend, int, int, torch.dtype], Call]
    work: float
    """10^9 operations, or bytes."""
    unit: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line("attention", __doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--scale", type=float, default=1.0, help="of the rows' number; 0.1 for a try")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    dtype: torch.dtype = getattr(torch, args.dtype)
    backends: dict[str, AttentionBackend] = {"sdpa": SdpaAttention()}
    for each, instructions in INSTRUCTION_SETS:
        if each == dtype and cpu_features() >= set(instructions) and compiler() is not None:
            backends[f"simd {instructions[-1]}"] = SimdAttention(SimdLibrary(dtype, instructions))
    print(f"{'':8} {'rows':>5} {'length':>6} {''.join(f'{name:>26}' for name in backends)}")
    results = [_measure(one, backends, dtype, args.rounds) for one in _passes(dtype, args)]
    print_result("attention", dtype=args.dtype, threads=args.threads, passes=results)
    return 0


def _measure(
    one: Pass, backends: dict[str, AttentionBackend], dtype: torch.dtype, rounds: int
) -> dict[str, str | int | float]:
    calls: dict[str, Call] = {}
    for name, backend in backends.items():
        torch.manual_seed(0)
        calls[name] = one.prepare(backend, one.length, one.rows, dtype)
    with torch.inference_mode():
        expected, *others = (call().float() for call in calls.values())
        for other in others:
            torch.testing.assert_close(other, expected, rtol=0, atol=MAX_DIFFERENCE[dtype])
        times = {name: found.wall for name, found in time_in_turns(calls, rounds).items()}
    cells = (f"{ms:11.2f} ms {one.work / ms * 1e3:6.0f} {one.unit}" for ms in times.values())
    print(f"{one.name:8} {one.rows:5} {one.length:6} {''.join(cells)}", flush=True)
    return {"pass": one.name, "rows": one.rows, "length": one.length, **times}


def _passes(dtype: torch.dtype, args: argparse.Namespace) -> list[Pass]:
    found = []
    for length, count in ((5476, 2), (784, 16), (64, 64)):
        work = 4 * SHAPE.vision_heads * VISION_DIM * length**2 / 1e9
        found.append(Pass("vision", length, count, _vision, work, "GF/s"))
    for length, count in ((1300, 4), (230, 16)):
        work = 2 * SHAPE.heads * SHAPE.head_dim * length**2 / 1e9
        found.append(Pass("prefill", length, count, _prefill, work, "GF/s"))
    for length, count in ((280, 16), (1400, 64), (2000, 1)):
        work = 2 * SHAPE.kv_heads * SHAPE.head_dim * dtype.itemsize * length / 1e9
        found.append(Pass("decode", length, count, _decode, work, "GB/s"))
    counts = [max(1, int(one.rows * args.scale)) for one in found]
    return [one._replace(rows=n, work=n * one.work) for one, n in zip(found, counts, strict=True)]


def _vision(backend: AttentionBackend, length: int, count: int, dtype: torch.dtype) -> Call:
    q, k, v = torch.randn(length * count, 3, SHAPE.vision_heads, VISION_DIM).to(dtype).unbind(1)
    backend.begin_vision([length] * count, CPU)
    return partial(backend.vision, q, k, v)


def _cached(backend: AttentionBackend, length: int, count: int, dtype: torch.dtype) -> tuple[KVCache, list[list[int]]]:
    """A cache with rows of random keys and values, and their tables."""
    width = -(-length // backend.block_size)
    cache = KVCache(
        [CPU],
        num_blocks=count * width,
        block_size=backend.block_size,
        num_kv_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim,
        dtype=dtype,
    )
    cache.storage[CPU].normal_()
    return cache, torch.randperm(count * width).view(count, width).tolist()


def _prefill(backend: AttentionBackend, length: int, count: int, dtype: torch.dtype) -> Call:
    cache, tables = _cached(backend, length, count, dtype)
    blocks = torch.tensor(tables)[:, :, None] * backend.block_size + torch.arange(backend.block_size)
    slots = blocks.flatten(1)[:, :length].flatten()
    k, v = (part[0].flatten(0, 1)[slots] for part in (cache.keys, cache.values))
    q = torch.randn(length * count, SHAPE.heads, SHAPE.head_dim).to(dtype)
    backend.begin_prefill(PrefillInfo([length] * count, [0] * count, tables, slots), cache)
    return partial(backend.prefill, q, k, v, cache, 0)


def _decode(backend: AttentionBackend, length: int, count: int, dtype: torch.dtype) -> Call:
    cache, tables = _cached(backend, length, count, dtype)
    lengths = torch.full((count,), length, dtype=torch.int32)
    info = DecodeInfo(torch.empty(0), lengths, torch.tensor(tables, dtype=torch.int32), lengths.tolist())
    backend.begin_decode(info, cache)
    return partial(backend.decode, torch.randn(count, SHAPE.heads, SHAPE.head_dim).to(dtype), cache, 0)


if __name__ == "__main__":
    sys.exit(main())
