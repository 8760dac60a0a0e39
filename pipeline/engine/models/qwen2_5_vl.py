"""Qwen2.5-VL: RMSNorm and SwiGLU in the tower, attention within windows of a frame, positions by seconds of video.

Most blocks attend within windows of 8 x 8 patches, a few within frames. So that a window's patches are neighbours, the
visual tokens of a frame, four patches each, are put in the order of its windows before the blocks, and back after them:

    0  1  2  3 | 4  5        windows of 4 x 4 visual tokens, smaller at the right and the lower edge; this frame of
    6  7  8  9 |10 11        2 x 6 has two: 0 1 2 3 6 7 8 9 and 4 5 10 11
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from pipeline.engine.device import upload
from pipeline.engine.models.architecture import Architecture
from pipeline.engine.models.mlp import GatedMlp, align_width
from pipeline.engine.models.mrope import PositionRule
from pipeline.engine.models.vision import Block, Frames, VisionModel, patch_coordinates
from pipeline.engine.sequence import MERGE_SIZE

_UNIT = MERGE_SIZE**2
"""Patches of a visual token."""


class Qwen25VLVision(VisionModel):
    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        config = model.config.vision_config
        self._within_frames = frozenset(config.fullatt_block_indexes)
        self._side = config.window_size // MERGE_SIZE // config.patch_size
        merger = model.model.visual.merger
        self.merge_norm = merger.ln_q
        self.merge1, self.merge2 = self.dense(merger.mlp[0]), self.dense(merger.mlp[2])

    def make_block(self, block: Any) -> Block:
        gate, up, down = block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj
        if down.weight.device.type == "cuda":
            align_width(gate, up, down)  # published checkpoints are 3,420 wide
        mlp = GatedMlp(self.dense(gate, up), self.dense(down))
        return Block(block.norm1, self.dense(block.attn.qkv), self.dense(block.attn.proj), block.norm2, mlp)

    def run(self, frames: Sequence[Frames]) -> torch.Tensor:
        order, windows = _pass_windows(frames, self._side)
        hidden = self.embed(self.pixel_values(frames))
        width = hidden.shape[1]
        hidden = hidden.view(-1, _UNIT * width).index_select(0, upload(order, self.device)).view(-1, width)
        rotation = self.rotation(patch_coordinates(frames).reshape(-1, _UNIT, 2)[order].reshape(-1, 2))
        delta: torch.Tensor | None = None
        previous: bool | None = None
        for index, block in enumerate(self.blocks):
            if (whole := index in self._within_frames) is not previous:
                if whole:
                    self.begin_frames(frames)
                else:
                    self.attention.begin_vision(windows, self.device)
                previous = whole
            hidden, delta = self.run_block(block, hidden, delta, rotation)
        _, normed = self.add_norm(hidden, delta, self.merge_norm)
        merged = self.merge2(F.gelu(self.merge1(normed.view(-1, _UNIT * width))))
        return merged.index_select(0, upload(np.argsort(order), self.device))


def _pass_windows(frames: Sequence[Frames], side: int) -> tuple[npt.NDArray[np.int64], list[int]]:
    """(visual tokens of a pass in the order of their windows, patches of each window)."""
    orders: list[npt.NDArray[np.int64]] = []
    lengths: list[int] = []
    first = 0
    for part in frames:
        order, windows = frame_windows(*part.medium.grid_thw[1:], side)
        for _ in range(part.start, part.stop):
            orders.append(order + first)
            lengths += windows
            first += len(order)
    return np.concatenate(orders), lengths


@lru_cache(maxsize=256)
def frame_windows(h: int, w: int, side: int) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Of a frame of h x w patches: (its visual tokens in the order of their windows, patches of each window)."""
    rows, columns = h // MERGE_SIZE, w // MERGE_SIZE
    tokens = np.arange(rows * columns).reshape(rows, columns)
    windows = [
        tokens[top : top + side, left : left + side].reshape(-1)
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]
    return np.concatenate(windows), [_UNIT * len(window) for window in windows]


def _problems(config: Any) -> Iterator[str]:
    vision = config.vision_config
    if vision.hidden_act not in ("silu", "swish"):
        yield f"hidden_act of the vision tower is {vision.hidden_act!r}, expected 'silu'"
    if vision.window_size < MERGE_SIZE * vision.patch_size:
        yield f"vision_config.window_size is {vision.window_size}, expected at least {MERGE_SIZE * vision.patch_size}"


QWEN2_5_VL = Architecture(
    model_class="Qwen2_5_VLForConditionalGeneration",
    patch_size=14,
    vision=Qwen25VLVision,
    output_width="out_hidden_size",
    mrope_section=(16, 24, 24),
    interleaved=False,
    positions=lambda config: PositionRule(tokens_per_second=config.vision_config.tokens_per_second),
    problems=_problems,
)
