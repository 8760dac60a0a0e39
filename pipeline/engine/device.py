"""What code for a GPU must mind: the calling thread's current device, and copies that the host doesn't wait for."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import numpy.typing as npt
import torch


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one of this thread: events, graphs and Triton's kernels go there, wherever their
    tensors lie. Nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on `device`. For a GPU through pinned memory, the only kind it copies from without the host waiting;
    on a CPU it shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def local_gpu_name() -> str | None:
    """The first GPU of this machine, as its driver names it; None where there is none."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
