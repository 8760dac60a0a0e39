"""Decode passes as CUDA graphs: one for each padded batch size, captured at warm-up or when first needed.

A graph replays fixed kernels over fixed buffers, so whatever changes from pass to pass is copied into those buffers
first. Padding rows attend to one token and write to the cache's scrap block.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.engine.attention.interface import DecodeInfo

Forward = Callable[[torch.Tensor, torch.Tensor, DecodeInfo], torch.Tensor]
"""(tokens [R], positions [R], info) -> logits [R, vocabulary]"""


def graph_sizes(max_running: int) -> list[int]:
    """1, 2, 4, 8, 16, then steps of 16 to 128 and of 32 above: at most a few dozen captures."""
    sizes = [1, 2, 4, 8, *range(16, 128, 16), *range(128, max_running + 32, 32)]
    return [size for size in sizes if size < max_running] + [max_running]


@dataclass
class _Buffers:
    rows: torch.Tensor  # [R] rows of last_tokens
    positions: torch.Tensor  # [R]
    slots: torch.Tensor  # [R]
    lengths: torch.Tensor  # [R] int32
    tables: torch.Tensor  # [R, width] int32


class DecodeGraphs:
    def __init__(
        self,
        forward: Forward,
        last_tokens: torch.Tensor,
        *,
        max_running: int,
        max_width: int,
        scrap_slot: int,
    ) -> None:
        self.forward = forward
        self.last_tokens = last_tokens
        self.sizes = graph_sizes(max_running)
        self.max_width = max_width
        self.scrap_slot = scrap_slot
        self._graphs: dict[int, tuple[Any, torch.Tensor]] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()
        device = last_tokens.device
        # A stream of our own: torch's belongs to the device that captured first in this process.
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        size = self.sizes[-1]
        self._buffers = _Buffers(
            rows=torch.zeros(size, dtype=torch.int64, device=device),
            positions=torch.zeros(size, dtype=torch.int64, device=device),
            slots=torch.full((size,), scrap_slot, dtype=torch.int64, device=device),
            lengths=torch.ones(size, dtype=torch.int32, device=device),
            tables=torch.zeros(size, max_width, dtype=torch.int32, device=device),
        )

    @property
    def captured(self) -> list[int]:
        """Batch sizes that have a graph, in the order of capture."""
        return list(self._graphs)

    def fits(self, num_rows: int, width: int) -> bool:
        return num_rows <= self.sizes[-1] and width <= self.max_width

    def replay(
        self,
        rows: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int32],
        tables: npt.NDArray[np.int32],
    ) -> torch.Tensor:
        num_rows = len(rows)
        size = self.sizes[bisect_left(self.sizes, num_rows)]
        padding = size - num_rows
        buffers = self._buffers
        _fill(buffers.rows, np.pad(rows, (0, padding)))
        _fill(buffers.positions, np.pad(positions, (0, padding)))
        _fill(buffers.slots, np.pad(slots, (0, padding), constant_values=self.scrap_slot))
        _fill(buffers.lengths, np.pad(lengths, (0, padding), constant_values=1))
        # Padding rows read block 0, whatever it holds: their result is discarded.
        padded = np.zeros((size, tables.shape[1]), dtype=np.int32)
        padded[:num_rows] = tables
        buffers.tables[:size, : tables.shape[1]].copy_(torch.from_numpy(padded).pin_memory(), non_blocking=True)
        self.capture(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:num_rows]

    def _run(self, size: int) -> torch.Tensor:
        buffers = self._buffers
        info = DecodeInfo(buffers.slots[:size], buffers.lengths[:size], buffers.tables[:size])
        tokens = self.last_tokens.index_select(0, buffers.rows[:size])
        return self.forward(tokens, buffers.positions[:size], info)

    def capture(self, size: int) -> None:
        """Make the graph for this batch size, unless there is one."""
        if size in self._graphs:
            return
        # A run outside the graph first, in which libraries allocate their workspaces. It writes the keys and values
        # that the replay writes again; with fresh buffers, into the scrap block.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._run(size)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                logits = self._run(size)
        except BaseException:
            self._end_failed_capture(before)
            raise
        self._graphs[size] = (graph, logits)

    def _end_failed_capture(self, before: torch.cuda.Stream) -> None:
        """A capture that the driver has refused leaves its stream the current one, and the allocator waiting for its
        end: memory that two streams have used, as uploads of patches have, would never be free again."""
        torch.cuda.set_stream(before)
        with contextlib.suppress(AttributeError, RuntimeError):  # not public; it raises where the capture did end
            torch._C._cuda_endAllocateToPool(before.device_index, self._pool)


def _fill(buffer: torch.Tensor, values: npt.NDArray[Any]) -> None:
    buffer[: len(values)].copy_(torch.from_numpy(values).pin_memory(), non_blocking=True)
