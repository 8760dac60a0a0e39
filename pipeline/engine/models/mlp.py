"""The part of a block after attention, of both halves of the model: [N, C] -> [N, C].

On a CPU the rows go through it in slices, so that the wide values between the two products stay in the caches and in
memory that the process holds already; the same bits, up to 1.2 times faster (docs/performance.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from pipeline.engine.dense import Dense
from pipeline.engine.kernels.eager import EagerKernels, row_slices


class Mlp(Protocol):
    @property
    def width(self) -> int:
        """Of what its activation sees."""

    def __call__(self, x: torch.Tensor, kernels: EagerKernels) -> torch.Tensor: ...


@dataclass
class PlainMlp:
    """Two products with an activation between them."""

    fc1: Dense
    act: Any
    fc2: Dense
    has_quick_gelu: bool = False

    @property
    def width(self) -> int:
        return self.fc1.out_features

    def __call__(self, x: torch.Tensor, kernels: EagerKernels) -> torch.Tensor:
        act = kernels.quick_gelu if self.has_quick_gelu else self.act
        return _joined([self.fc2(act(self.fc1(x[rows]))) for rows in row_slices(x)])


@dataclass
class GatedMlp:
    """SwiGLU: the product of a gate, through SiLU, and of another product."""

    gate_up: Dense
    down: Dense

    @property
    def width(self) -> int:
        return self.down.in_features

    def __call__(self, x: torch.Tensor, kernels: EagerKernels) -> torch.Tensor:
        return _joined([self.down(kernels.silu_times_up(self.gate_up(x[rows]))) for rows in row_slices(x)])


ALIGNED_BYTES = 16
"""Rows of a matrix that begin at multiples of this are multiplied by cuBLAS's fast kernels: 60,236 rows by a matrix of
3,420 columns in bfloat16 took 2.30 ms on an H200, by one of 3,424 columns 0.69 ms."""


def align_width(gate: Any, up: Any, down: Any) -> None:
    """Widen the three nn.Linear of a gated MLP by zeros where their width is not aligned. They change no result: the
    added values are SiLU(0) x 0, and are multiplied by 0."""
    missing = -down.weight.shape[1] % (ALIGNED_BYTES // down.weight.itemsize)
    if not missing:
        return
    down.weight.data = F.pad(down.weight.data, (0, missing))
    for each in (gate, up):
        each.weight.data = F.pad(each.weight.data, (0, 0, 0, missing))
        if each.bias is not None:
            each.bias.data = F.pad(each.bias.data, (0, missing))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
