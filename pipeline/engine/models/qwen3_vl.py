"""Qwen3-VL: a learned table of places besides the rotation, features of several blocks for the first text layers.

The table has 48 x 48 places, which are spread over each frame and interpolated. What some blocks of the tower give goes
through mergers of their own and is added to the visual tokens behind text layers 0, 1 and 2 ("deepstack"). Each
temporal step of a video stands in the prompt by itself, after its time, and is numbered as an image is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from pipeline.engine.dense import Dense
from pipeline.engine.device import upload
from pipeline.engine.models.architecture import Architecture
from pipeline.engine.models.mlp import PlainMlp
from pipeline.engine.models.mrope import PositionRule
from pipeline.engine.models.vision import (
    Block,
    Frames,
    VisionModel,
    frame_coordinates,
    patch_coordinates,
)
from pipeline.engine.sequence import MERGE_SIZE


class _Merger:
    """Four patches to one visual token. `norm` sees patches, or the four of a token side by side."""

    def __init__(self, norm: Any, fc1: Dense, fc2: Dense) -> None:
        self.norm, self._fc1, self._fc2 = norm, fc1, fc2

    def __call__(self, normed: torch.Tensor) -> torch.Tensor:
        return self._fc2(F.gelu(self._fc1(normed.view(-1, self._fc1.in_features))))


class Qwen3VLVision(VisionModel):
    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        tower = model.model.visual
        self._places: torch.Tensor = tower.pos_embed.weight
        self._side = math.isqrt(len(self._places))
        self._merger = self._make_merger(tower.merger)
        blocks = model.config.vision_config.deepstack_visual_indexes
        self._deep_mergers = dict(zip(blocks, map(self._make_merger, tower.deepstack_merger_list), strict=True))
        self.num_deep = len(self._deep_mergers)

    def _make_merger(self, merger: Any) -> _Merger:
        return _Merger(merger.norm, self.dense(merger.linear_fc1), self.dense(merger.linear_fc2))

    def make_block(self, block: Any) -> Block:
        mlp = PlainMlp(self.dense(block.mlp.linear_fc1), block.mlp.act_fn, self.dense(block.mlp.linear_fc2))
        return Block(block.norm1, self.dense(block.attn.qkv), self.dense(block.attn.proj), block.norm2, mlp)

    def run(self, frames: Sequence[Frames]) -> torch.Tensor:
        hidden = self.embed(self.pixel_values(frames))
        hidden = hidden + self._embedded_places(frames, hidden.dtype)
        rotation = self.rotation(patch_coordinates(frames))
        self.begin_frames(frames)
        delta: torch.Tensor | None = None
        deep: list[torch.Tensor] = []
        for index, block in enumerate(self.blocks):
            hidden, delta = self.run_block(block, hidden, delta, rotation)
            if (merger := self._deep_mergers.get(index)) is not None:
                hidden, delta = hidden + delta, None
                deep.append(merger(merger.norm(hidden.view(-1, MERGE_SIZE**2 * hidden.shape[1]))))
        _, normed = self.add_norm(hidden, delta, self._merger.norm)
        return torch.cat([self._merger(normed), *deep], dim=1)

    def _embedded_places(self, frames: Sequence[Frames], dtype: torch.dtype) -> torch.Tensor:  # [N, C]
        found: dict[tuple[int, int], torch.Tensor] = {}
        parts: list[torch.Tensor] = []
        for part in frames:
            size = part.medium.grid_thw[1:]
            if size not in found:
                places, weights = interpolation(*size, self._side)
                embedded = F.embedding(upload(places, self.device), self._places)
                # Weights in float32, the sum rounded once, as transformers does.
                found[size] = (embedded * upload(weights, self.device)[:, :, None]).sum(1).to(dtype)
            parts += [found[size]] * (part.stop - part.start)
        return torch.cat(parts)


@lru_cache(maxsize=64)
def interpolation(h: int, w: int, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Of each patch of a frame, in merge-block order: (the four places of the table around it, their weights), both
    [h * w, 4]. The table's corners lie on the frame's."""
    coordinates = frame_coordinates(h, w)
    axes = [_axis(coordinates[:, axis], size, side) for axis, size in enumerate((h, w))]
    (rows, row_weights), (columns, column_weights) = axes
    places = rows[:, :, None] * side + columns[:, None, :]
    weights = row_weights[:, :, None] * column_weights[:, None, :]
    return places.reshape(-1, 4), weights.reshape(-1, 4)


def _axis(index: npt.NDArray[np.int32], size: int, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The two places before and behind each index along one axis, and their weights; both [N, 2], in float32."""
    source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    floor = np.floor(source)
    offsets = np.arange(2, dtype=np.float32)
    weights = np.maximum(np.float32(1) - np.abs(source[:, None] - floor[:, None] - offsets), np.float32(0))
    places = np.clip(floor[:, None].astype(np.int64) + offsets.astype(np.int64), 0, side - 1)
    return places, weights.astype(np.float32)


def _problems(config: Any) -> Iterator[str]:
    text, vision = config.text_config, config.vision_config
    blocks = list(vision.deepstack_visual_indexes)
    if blocks != sorted(set(blocks)) or any(not 0 <= block < vision.depth for block in blocks):
        yield f"deepstack_visual_indexes is {blocks}, expected growing numbers of the tower's {vision.depth} blocks"
    if len(blocks) > text.num_hidden_layers:
        found, layers = len(blocks), text.num_hidden_layers
        yield f"deepstack_visual_indexes has {found} blocks, expected at most the text model's {layers} layers"
    if math.isqrt(vision.num_position_embeddings) ** 2 != vision.num_position_embeddings:
        yield f"num_position_embeddings is {vision.num_position_embeddings}, expected a square number"


QWEN3_VL = Architecture(
    model_class="Qwen3VLForConditionalGeneration",
    patch_size=16,
    vision=Qwen3VLVision,
    output_width="out_hidden_size",
    mrope_section=(24, 20, 20),
    interleaved=True,
    positions=lambda config: PositionRule(separate_steps=True),
    problems=_problems,
)
