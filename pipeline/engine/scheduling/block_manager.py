"""Which blocks of the key-value cache are free, and how many tables own each. Integers only: no torch, no sequences.

free      [5, 2, 7, ...]         a stack; the block freed last is allocated first
owners    [1, 3, 0, 1, ...]      owners[b] tables list block b; 0 means free
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._owners[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Give these blocks one more owner; from now on they are only read."""
        for block in blocks:
            assert self._owners[block] > 0, f"block {block} is free and can't be shared"
            self._owners[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert self._owners[block] > 0, f"block {block} released twice"
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._free.append(block)

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Assert that every block is either free, or listed by exactly as many tables as it has owners."""
        listed = Counter(block for table in tables for block in table)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        for block, owners in enumerate(self._owners):
            assert owners == listed[block], f"block {block}: {owners} owners, listed {listed[block]} times"
            assert (owners == 0) == (block in free), f"block {block}: {owners} owners, free={block in free}"
