"""Attention behind one interface, and what a pass tells it.

Three shapes of attention; every backend computes all of them:

    vision    every patch sees its own frame        packed frames, one after another
    prefill   a token sees its own past             packed prompts; the past may lie in the cache
    decode    one token of each row sees its past   all of it in the cache

    N patches or packed tokens   R rows   H query heads   K kv heads   D head_dim

`sdpa` is the reference and runs anywhere; the tests compare the others with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.engine.kv_cache import KVCache


@dataclass
class PrefillInfo:
    """Packed prompts: row i has lengths[i] tokens in this pass and starts[i] before it in the cache."""

    lengths: list[int]
    starts: list[int]
    tables: list[list[int]]
    slots: torch.Tensor
    """[N] cache slot of each token, for writing."""


@dataclass
class DecodeInfo:
    """One token of each row; lengths count the token itself, which is written before attention runs."""

    slots: torch.Tensor
    """[R]"""
    lengths: torch.Tensor
    """[R] int32 on the device."""
    tables: torch.Tensor
    """[R, width of the widest] int32 block tables on the device, padded with block 0."""
    host_lengths: Sequence[int] = ()
    """The same as `lengths`, for backends whose shapes depend on it; empty inside a CUDA graph."""


class AttentionBackend(ABC):
    name: str
    block_size: int
    """The cache's block size that the decode kernel needs."""
    allows_graphs = False
    """Whether decode can be captured: no shape may depend on the rows' lengths."""

    @property
    def vision_name(self) -> str:
        """The kernel of vision attention."""
        return self.name

    @property
    def prefill_name(self) -> str:
        """The kernel of prefill attention."""
        return self.name

    @property
    def kernel_ms(self) -> dict[str, dict[str, float]]:
        """Of vision and prefill, where several kernels were tried: milliseconds of a full pass, the fastest first."""
        return {}

    @property
    def for_vision(self) -> AttentionBackend:
        """The backend that computes vision attention."""
        return self

    @property
    def for_prefill(self) -> Sequence[AttentionBackend]:
        """The backends that compute prefill attention."""
        return [self]

    @abstractmethod
    def begin_vision(self, frame_lengths: Sequence[int], device: torch.device) -> None:
        """Prepare a vision pass over frames of these many patches, for all its layers."""

    @abstractmethod
    def vision(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [N, H, D] -> [N, H, D]."""

    @abstractmethod
    def begin_prefill(self, info: PrefillInfo, cache: KVCache) -> None:
        """Prepare a prefill pass, for all its layers."""

    @abstractmethod
    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        """q [N, H, D], k and v [N, K, D], already written to the cache -> [N, H, D]."""

    @abstractmethod
    def begin_decode(self, info: DecodeInfo, cache: KVCache) -> None:
        """Prepare a decode pass, for all its layers."""

    @abstractmethod
    def decode(self, q: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        """q [R, H, D] -> [R, H, D]."""


def gather_context(cache: KVCache, layer: int, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [length, K, D] of one sequence, out of its blocks."""
    keys = cache.keys[layer].index_select(0, table).flatten(0, 1)[:length]
    values = cache.values[layer].index_select(0, table).flatten(0, 1)[:length]
    return keys, values
