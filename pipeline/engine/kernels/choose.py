"""Which kernels may run here, before any of them is tried: fused ones on a GPU with Triton, eager ones anywhere."""

from __future__ import annotations

import importlib.util

import torch

from pipeline.engine.kernels.eager import EAGER, EagerKernels
from pipeline.engine.trial import Candidate


def kernel_candidates(wanted: str, device: torch.device) -> tuple[Candidate[EagerKernels], ...]:
    """What `engine.kernels` allows here, in order of preference, with the eager ones as the last."""
    eager = Candidate("eager", lambda: EAGER)
    if wanted == "eager" or device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return (eager,)
    return Candidate("fused", _load_fused), eager


def _load_fused() -> EagerKernels:
    # Imported when tried: it needs triton.
    from pipeline.engine.kernels.fused import FusedKernels

    return FusedKernels()
