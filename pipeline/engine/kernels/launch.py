"""How a Triton kernel is launched. Another launcher may count launches, or compile without running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.engine.device import current

Launch = Callable[..., None]
"""(kernel, grid, *arguments, **constants and compiler options); the first argument is a tensor."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    # Triton launches on the current device, wherever the tensors are.
    with current(arguments[0].device):
        kernel[grid](*arguments, **constants)
