"""Kernels of other packages that may be faster than a backend's own, and which one is: measured while an engine loads.

Knows packed attention; what vision does with equal frames is vision.py's.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from pipeline.engine.attention.interface import AttentionBackend
from pipeline.engine.attention.packed import NamedKernel, PackedAttention, Packing, Varlen, pack
from pipeline.engine.device import is_alive

log = logging.getLogger(__name__)

MAX_DIFFERENCE = 0.02
"""Between the results of two kernels, as a share of their norm. Rounding to bfloat16 explains less than half of it."""

PROMPT_TOKENS = 1024
"""Of a prompt, with which kernels are measured; one has as many before it in the cache."""

TIMED_CALLS = 8
HEAD_START_CYCLES = 40_000_000
"""For which the GPU idles first, some 20 ms: the calls are launched meanwhile, so a busy host does not slow them."""

Call = Callable[[], torch.Tensor]
Seconds = Callable[[Callable[[], object]], float]


def hopper_kernels(device: torch.device) -> dict[str, Varlen]:
    """FlashAttention 3, from whichever package has it, by its name in reports. It runs on Hopper only."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return {}
    for package in ("fa3_fwd_interface", "flash_attn_interface"):
        try:
            return {"fa3": partial(_call, importlib.import_module(package).flash_attn_varlen_func)}
        except ImportError:
            continue
        except Exception as error:  # a package of another torch or CUDA may raise anything while it loads
            log.warning("attention: %s can't be used: %s: %s", package, type(error).__name__, error)
    return {}


def _call(
    function: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: Packing,
    keys: Packing,
    causal: bool,
) -> torch.Tensor:
    """A function with the arguments that flash-attn gave their names."""
    out = function(
        q,
        k,
        v,
        cu_seqlens_q=queries.ends,
        cu_seqlens_k=keys.ends,
        max_seqlen_q=queries.longest,
        max_seqlen_k=keys.longest,
        causal=causal,
    )
    result: torch.Tensor = out[0] if isinstance(out, tuple) else out  # some releases add the logarithms
    return result


def by_speed(part: str, tried: Mapping[str, Call], seconds: Seconds) -> dict[str, float]:
    """The milliseconds of each, the fastest first. All run twice: first to plan and to be compared, then on the clock.

    The first one is the reference. Others that raise or compute other numbers are left out, with one warning each.
    """
    reference = next(iter(tried))
    expected: torch.Tensor | None = None
    times: dict[str, float] = {}
    for name, call in tried.items():
        try:
            found = call()
            if expected is None:
                expected = found
            difference = float((found.float() - expected.float()).norm() / expected.float().norm())
            if not difference <= MAX_DIFFERENCE:  # also where it is NaN
                raise ArithmeticError(f"its result differs from that of {reference} by {difference:.2g} of its norm")
            del found
            times[name] = round(1e3 * seconds(call), 3)
        except Exception as error:
            if name == reference or (expected is not None and not is_alive(expected.device)):
                raise
            log.warning("%s attention: %s does not work here: %s: %s", part, name, type(error).__name__, error)
    return dict(sorted(times.items(), key=lambda each: each[1]))


def seconds_by_events(run: Callable[[], object]) -> float:
    """Of a call on the current device: the mean of several, without the time that it takes to launch them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    run()
    torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(TIMED_CALLS):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / TIMED_CALLS


def choose_prefill(
    attention: AttentionBackend,
    *,
    max_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: Seconds = seconds_by_events,
) -> None:
    """Let a backend use the kernel that is fastest for a full pass of prompts."""
    packed = [each for each in attention.for_prefill if isinstance(each, PackedAttention)]
    others = hopper_kernels(device)
    if not packed or not others:
        return
    kernels: dict[str, Varlen] = {packed[0].name: packed[0].varlen, **others}
    length = min(PROMPT_TOKENS, max_tokens)
    count = max_tokens // length
    lengths, totals = [length] * count, [2 * length, *[length] * (count - 1)]
    queries, keys = pack(lengths, device), pack(totals, device)
    q = _random([sum(lengths), num_heads, head_dim], dtype, device)
    k, v = (_random([sum(totals), num_kv_heads, head_dim], dtype, device) for _ in range(2))
    tried = {name: partial(kernel, q, k, v, queries, keys, True) for name, kernel in kernels.items()}
    times = by_speed("prefill", tried, seconds)
    fastest = next(iter(times))
    for each in packed:
        each.kernel_ms["prefill"] = times
        each.prompts = NamedKernel(fastest, kernels[fastest])


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device=device)
