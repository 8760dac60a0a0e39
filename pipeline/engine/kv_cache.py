"""Keys and values of all layers in blocks, sized from memory and written by slot number.

    keys[layer]: [blocks + 1, block_size, kv_heads, head_dim]       values likewise

    a sequence's table  [4, 0, 9]      token i lies in block table[i // block_size] at i % block_size;
                                       its slot number is block * block_size + i % block_size

The last block is scrap: padding rows of a CUDA graph write there. Layers may lie on several devices; a block has the
same number on all of them. Knows no sequences.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pipeline.errors import CheckpointError


class KVCache:
    def __init__(
        self,
        layer_devices: Sequence[torch.device],
        *,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.scrap_slot = num_blocks * block_size
        shape = (num_blocks + 1, block_size, num_kv_heads, head_dim)
        self.storage = {
            device: _zeros((2, num_layers, *shape), dtype, device)
            for device, num_layers in Counter(layer_devices).items()
        }
        """All keys and values of each device: [2, layers, blocks + 1, block_size, kv_heads, head_dim]."""
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        num_taken: Counter[torch.device] = Counter()
        for device in layer_devices:
            self.keys.append(self.storage[device][0, num_taken[device]])
            self.values.append(self.storage[device][1, num_taken[device]])
            num_taken[device] += 1
        self._moved: tuple[torch.Tensor, dict[torch.device, torch.Tensor]] | None = None

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Put keys and values [T, kv_heads, head_dim], on the layer's device, into slots [T], on any device."""
        slots = self.slots_on(keys.device, slots)
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)

    def slots_on(self, device: torch.device, slots: torch.Tensor) -> torch.Tensor:
        """The pass's slots on a device; moved once for all of the pass's layers."""
        if len(self.storage) == 1:
            return slots
        if self._moved is None or self._moved[0] is not slots:
            self._moved = (slots, {each: slots.to(each) for each in self.storage})
        return self._moved[1][device]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            for storage in self.storage.values():
                storage[:, :, target] = storage[:, :, source]

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def num_bytes(self) -> int:
        return sum(map(self.storage_bytes, self.storage))

    def storage_bytes(self, device: torch.device) -> int:
        return self.storage[device].nbytes


def bytes_for_cache(*, total: int, free: int, allocated: int, peak: int, share: float) -> int:
    """What an engine's share of a GPU's memory leaves for the cache.

    `allocated` bytes are this process's own at the moment, `free` ones nobody's, and a pass needs `peak` bytes at most,
    with the weights and without a cache. The share is one of all memory, so engines that load at the same time on one
    GPU do not depend on each other; what others hold already is left to them.
    """
    return min(int(share * total), free + allocated) - peak


def fitting_blocks(
    memory: Mapping[torch.device, float],
    layer_devices: Sequence[torch.device],
    *,
    setting: str,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> int:
    """As many blocks as each device has memory for, besides the scrap block. Raises CheckpointError, which names the
    setting to change, where that is none."""
    counts = []
    for device, num_layers in Counter(layer_devices).items():
        per_block = 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize
        counts.append(int(memory[device] // per_block) - 1)
        if counts[-1] < 1:
            raise CheckpointError(
                f"the key-value cache would get {max(0.0, memory[device]) / 1e9:.3f} GB, but one block of {block_size} "
                f"tokens takes {per_block / 1e9:.3f} GB; raise {setting}"
            )
    return min(counts)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, since attention multiplies what lies behind a masked slot by 0, and 0 x NaN is NaN.

    On a CPU, numpy's zeros are pages that the system provides when they are first touched; torch would touch them all.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8))
    return raw.view(dtype).view(shape)
