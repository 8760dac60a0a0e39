"""Which kernels run here: the fused ones on a GPU that has Triton, the eager ones elsewhere."""

from __future__ import annotations

import importlib.util

import torch

from pipeline.engine.kernels.eager import EAGER, EagerKernels


def pick_kernels(wanted: str, device: torch.device) -> EagerKernels:
    """The kernels that `engine.kernels` asks for; `auto` is the fused ones on CUDA where triton is installed."""
    if wanted == "eager" or device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return EAGER
    # Imported when chosen: it needs triton.
    from pipeline.engine.kernels.fused import FusedKernels

    return FusedKernels()
