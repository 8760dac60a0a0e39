"""Which kernels may run here, before any of them is tried: fused ones on a GPU with Triton, those for the vector
instructions of a CPU with a C compiler, eager ones anywhere."""

from __future__ import annotations

import importlib.util

import torch

from pipeline.engine.kernels.eager import EAGER, EagerKernels
from pipeline.engine.simd.c_library import compiler
from pipeline.engine.simd.library import instruction_set, simd_library
from pipeline.engine.trial import Candidate


def kernel_candidates(wanted: str, device: torch.device, dtype: torch.dtype) -> tuple[Candidate[EagerKernels], ...]:
    """What `engine.kernels` allows here, in order of preference, with the eager ones as the last."""
    eager = Candidate("eager", lambda: EAGER)
    if wanted == "eager":
        return (eager,)
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return Candidate("fused", _load_fused), eager
    if device.type == "cpu" and instruction_set(dtype) is not None and compiler() is not None:
        return Candidate("simd", lambda: _load_simd(dtype)), eager
    return (eager,)


def _load_fused() -> EagerKernels:
    # Imported when tried: it needs triton.
    from pipeline.engine.kernels.fused import FusedKernels

    return FusedKernels()


def _load_simd(dtype: torch.dtype) -> EagerKernels:
    from pipeline.engine.kernels.simd import SimdKernels

    return SimdKernels(simd_library(dtype))
