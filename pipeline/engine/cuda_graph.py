"""Decode passes as CUDA graphs: one for each padded batch size, captured at warm-up or when first needed.

A graph replays fixed kernels over fixed buffers, so whatever changes from pass to pass is copied into those buffers
first. Padding rows attend to one token and write to the cache's scrap block.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable
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
        self._graphs: dict[int, Any] = {}
        self._logits: torch.Tensor | None = None
        self._pool: Any = torch.cuda.graph_pool_handle()
        device = last_tokens.device
        # A stream of our own: torch's belongs to the device that captured first in this process.
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        size = self.sizes[-1]
        self._padding = np.repeat(np.asarray([[0], [0], [scrap_slot], [1]]), size, axis=1)
        """[4, R], as the numbers of a pass. Padding rows read block 0, whatever it holds: their result is discarded."""
        self._numbers = torch.from_numpy(self._padding).to(device)
        self._tables = torch.zeros(size, max_width, dtype=torch.int32, device=device)

    @property
    def captured(self) -> list[int]:
        """Batch sizes that have a graph, in the order of capture."""
        return list(self._graphs)

    def fits(self, num_rows: int, width: int) -> bool:
        return num_rows <= self.sizes[-1] and width <= self.max_width

    def replay(self, numbers: npt.NDArray[np.int64], tables: npt.NDArray[np.int32]) -> torch.Tensor:
        """Takes what `ModelRunner.decode_rows` takes."""
        num_rows, width = tables.shape
        size = self.sizes[bisect_left(self.sizes, num_rows)]
        padded = self._padding.copy()
        padded[:, :num_rows] = numbers
        _fill(self._numbers, padded)
        padded_tables = np.zeros((size, width), dtype=np.int32)
        padded_tables[:num_rows] = tables
        _fill(self._tables[:size, :width], padded_tables)
        self.capture(size)
        self._graphs[size].replay()
        assert self._logits is not None
        return self._logits[:num_rows]

    def _run(self, size: int) -> None:
        rows, positions, slots, lengths = self._numbers[:, :size]
        info = DecodeInfo(slots, lengths.int(), self._tables[:size])
        logits = self.forward(self.last_tokens.index_select(0, rows), positions, info)
        if self._logits is None:
            self._logits = logits.new_empty(self.sizes[-1], logits.shape[1])
        # One place for all graphs: the logits of dozens of sizes would take more than a gigabyte.
        self._logits[:size] = logits

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
                self._run(size)
        except BaseException:
            self._end_failed_capture(before)
            raise
        self._graphs[size] = graph

    def _end_failed_capture(self, before: torch.cuda.Stream) -> None:
        """A capture that the driver has refused leaves its stream the current one, and the allocator waiting for its
        end: memory that two streams have used, as uploads of patches have, would never be free again."""
        torch.cuda.set_stream(before)
        with contextlib.suppress(AttributeError, RuntimeError):  # not public; it raises where the capture did end
            torch._C._cuda_endAllocateToPool(before.device_index, self._pool)


def _fill(buffer: torch.Tensor, values: npt.NDArray[Any]) -> None:
    buffer.copy_(torch.from_numpy(values).pin_memory(), non_blocking=True)
