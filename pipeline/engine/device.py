"""What code for a GPU must mind: the thread's current device, copies that the host does not wait for, the ways in which
memory runs out, and which kernels torch prefers."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any

import numpy.typing as npt
import torch

from pipeline.errors import EngineOutOfMemory

os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
"""On Hopper and later torch's scaled_dot_product_attention prefers cuDNN, which plans every new shape for tenths of a
second: each step of `model.generate`, for example. What cuDNN refuses then raises, with no other kernel in its place.
torch reads this when attention first runs. attention/vision.py calls cuDNN by itself, where it pays."""


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one of this thread. Events, graphs and Triton's kernels use the current device,
    wherever their tensors lie. Nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on `device`. To a GPU through pinned memory, from which the copy does not make the host wait;
    on a CPU the tensor shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def is_alive(device: torch.device) -> bool:
    """Whether this process can still use the device. After an illegal memory access every CUDA call of a process fails,
    and only a new process helps."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:  # torch.AcceleratorError is one
        return False
    return True


_NO_MEMORY = (
    "out of memory",  # CUDA and Triton, beside torch's allocator
    "can't allocate memory",  # torch on a CPU
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "aten::new_empty",  # a package built for torch's stable ABI, as FlashAttention 3: only the operator is named
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something did not get the memory it needed, so that a smaller pass may succeed. Libraries have no common
    type for it: all but torch's allocator raise a RuntimeError that only its text tells from others."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, EngineOutOfMemory)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def gpu_name(device: torch.device | None = None) -> str | None:
    """The name of a GPU as its driver gives it, by default of this machine's first; None for a CPU."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    return torch.cuda.get_device_name(device or 0)
