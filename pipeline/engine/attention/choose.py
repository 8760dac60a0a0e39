"""Which attention backends may run here, before any of them is tried."""

from __future__ import annotations

import importlib.util
import logging

import torch

from pipeline.engine.attention.interface import AttentionBackend
from pipeline.engine.attention.simd import SimdAttention
from pipeline.engine.simd.c_library import compiler
from pipeline.engine.simd.library import instruction_set, simd_library
from pipeline.engine.trial import Candidate
from pipeline.errors import CheckpointError

log = logging.getLogger(__name__)

INSTALL_FLASH = "pip install flash-attn==2.8.3 --no-build-isolation (it compiles with torch below 2.14)"


def flash_attn_installed() -> bool:
    """Whether flash-attn is a package here. flash-attn-4 alone leaves a folder `flash_attn` without an `__init__.py`,
    which is a spec without an origin and can't be used."""
    spec = importlib.util.find_spec("flash_attn")
    return spec is not None and spec.origin is not None


def torch_varlen_available() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch.nn.attention.varlen", "triton"))


def attention_candidates(
    wanted: str, device: torch.device, dtype: torch.dtype
) -> tuple[Candidate[AttentionBackend], ...]:
    """What `engine.attention` allows here, in order of preference, with sdpa as the last one.

    Raises CheckpointError, which says what is missing, for one that can't run here.
    """
    names = ("flash", "torch", "simd") if wanted == "auto" else tuple({wanted} - {"sdpa"})
    problems = {name: _problem(name, device, dtype) for name in names}
    if wanted != "auto" and (problem := problems.get(wanted)) is not None:
        raise CheckpointError(f"engine.attention is {wanted!r}, {problem}")
    return tuple(_candidate(name, dtype) for name in (*names, "sdpa") if problems.get(name) is None)


def _candidate(name: str, dtype: torch.dtype) -> Candidate[AttentionBackend]:
    return Candidate(name, lambda: _load(name, dtype))


def _problem(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend can't run here; None if it can."""
    dtype_name = str(dtype).removeprefix("torch.")
    if name == "simd":
        if device.type != "cpu" or instruction_set(dtype) is None:
            return (
                "which needs a CPU with AVX2 for float32 or with AVX512_BF16 for bfloat16, "
                f"not {device} in {dtype_name}; use auto or sdpa"
            )
        if compiler() is None:
            log.info("attention and kernels for this CPU need a C compiler: install gcc or clang for a faster engine")
            return "but no C compiler is installed; install gcc or clang"
        return None
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        others = "auto, simd or sdpa" if device.type == "cpu" and instruction_set(dtype) else "auto or sdpa"
        return f"which needs an NVIDIA GPU and bfloat16 or float16, not {device} in {dtype_name}; use {others}"
    if name == "flash" and not flash_attn_installed():
        return f"but flash-attn is missing; install it with {INSTALL_FLASH}"
    if name == "torch" and not torch_varlen_available():
        return "but this torch has no varlen kernels or no triton; install them with pip install 'torch>=2.11' triton"
    return None


def _load(name: str, dtype: torch.dtype) -> AttentionBackend:
    # Imported when chosen: the first needs flash-attn, the second triton.
    if name == "flash":
        from pipeline.engine.attention.flash import FlashAttention

        return FlashAttention()
    if name == "torch":
        from pipeline.engine.attention.torch_varlen import TorchAttention

        return TorchAttention()
    if name == "simd":
        return SimdAttention(simd_library(dtype))
    from pipeline.engine.attention.sdpa import SdpaAttention

    return SdpaAttention()
