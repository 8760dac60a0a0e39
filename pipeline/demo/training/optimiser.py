"""The recipe's optimiser: orthogonalised momentum (Muon) for the layers' matrices, AdamW for everything else.

Knows tensors; not the model. A patch's brightness and tint outweigh its edges a hundredfold, so that an optimiser
which scales each number by itself learns colours at once and shapes late; making every direction of an update
equally long learns both together. Processes share the work: each one makes every second update and they swap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed

_MOMENTUM = 0.95
# As much root mean square as AdamW's updates have, so that one learning rate suits both, doubled.
_SCALE = 0.4
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon:
    """Steps on matrices: the momentum's nearest orthogonal matrix, by a few iterations of Newton and Schulz."""

    def __init__(self, matrices: Sequence[torch.Tensor], *, weight_decay: float, rank: int, processes: int) -> None:
        self.matrices = list(matrices)
        self.momenta = [torch.zeros_like(matrix) for matrix in self.matrices]
        self._weight_decay, self._rank, self._processes = weight_decay, rank, processes
        self._owners = _owners([_work(matrix) for matrix in self.matrices], processes)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move every matrix; all processes move theirs alike."""
        updates = []
        for matrix, momentum, owner in zip(self.matrices, self.momenta, self._owners, strict=True):
            assert matrix.grad is not None
            momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
            if owner == self._rank:
                ahead = torch.lerp(matrix.grad, momentum, _MOMENTUM).flatten(1)
                updates.append(orthogonalise(ahead) * (_SCALE * max(ahead.shape) ** 0.5))
            else:
                updates.append(torch.zeros_like(momentum))
        if self._processes > 1:
            together = torch.cat([update.flatten() for update in updates])
            torch.distributed.all_reduce(together)
            updates = list(torch.split(together, [update.numel() for update in updates]))
        for matrix, update in zip(self.matrices, updates, strict=True):
            matrix.mul_(1 - learning_rate * self._weight_decay)
            matrix.sub_(update.view_as(matrix), alpha=learning_rate)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix of the same directions whose singular values are all near one."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x: torch.Tensor = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    out: torch.Tensor = x.T if tall else x
    return out


def _work(matrix: torch.Tensor) -> int:
    short, long = sorted(matrix.flatten(1).shape)
    return short * short * (2 * long + short)


def _owners(work: list[int], processes: int) -> list[int]:
    """Who makes which update: the largest first, each to whoever has least to do."""
    loads, owners = [0] * processes, [0] * len(work)
    for index in sorted(range(len(work)), key=lambda index: -work[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += work[index]
    return owners
