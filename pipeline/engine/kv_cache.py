"""Keys and values in blocks, one tensor for all layers; sized from memory, written by slot number.

    keys[layer]: [blocks + 1, block_size, kv_heads, head_dim]       values likewise

    a sequence's table  [4, 0, 9]      token i lies in block table[i // block_size] at i % block_size;
                                       its slot number is block * block_size + i % block_size

The one block more is scrap: padding rows of a CUDA graph write there. Knows no sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch


class KVCache:
    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.scrap_slot = num_blocks * block_size
        shape = (2, num_layers, num_blocks + 1, block_size, num_kv_heads, head_dim)
        storage = _zeros(shape, dtype, device)
        self.keys, self.values = storage[0], storage[1]

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Put keys and values [T, kv_heads, head_dim] into slots [T]."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            self.keys[:, target] = self.keys[:, source]
            self.values[:, target] = self.values[:, source]

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, since attention multiplies what lies behind a masked place by 0, and 0 x NaN is NaN.

    numpy's zeros are pages the system hands out when first touched; torch's would be touched at once.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    width = torch.empty((), dtype=dtype).element_size()
    raw = torch.from_numpy(np.zeros(math.prod(shape) * width, dtype=np.uint8))
    return raw.view(dtype).view(shape)


def block_bytes(*, num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    width = torch.empty((), dtype=dtype).element_size()
    return 2 * num_layers * block_size * num_kv_heads * head_dim * width
