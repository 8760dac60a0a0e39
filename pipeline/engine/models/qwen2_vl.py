"""Qwen2-VL: LayerNorm and a plain MLP in the tower, attention within frames; a step of a video takes one position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from pipeline.engine.models.architecture import Architecture
from pipeline.engine.models.mlp import PlainMlp
from pipeline.engine.models.mrope import PositionRule
from pipeline.engine.models.vision import Block, Frames, VisionModel, patch_coordinates
from pipeline.engine.sequence import MERGE_SIZE


class Qwen2VLVision(VisionModel):
    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self._has_quick_gelu = model.config.vision_config.hidden_act == "quick_gelu"
        super().__init__(model, *args, **kwargs)
        merger = model.model.visual.merger
        self.merge_norm = merger.ln_q
        self.merge1, self.merge2 = self.dense(merger.mlp[0]), self.dense(merger.mlp[2])

    def make_block(self, block: Any) -> Block:
        mlp = PlainMlp(self.dense(block.mlp.fc1), block.mlp.act, self.dense(block.mlp.fc2), self._has_quick_gelu)
        return Block(block.norm1, self.dense(block.attn.qkv), self.dense(block.attn.proj), block.norm2, mlp)

    def run(self, frames: Sequence[Frames]) -> torch.Tensor:
        hidden = self.embed(self.pixel_values(frames))
        rotation = self.rotation(patch_coordinates(frames))
        self.begin_frames(frames)
        delta: torch.Tensor | None = None
        for block in self.blocks:
            hidden, delta = self.run_block(block, hidden, delta, rotation)
        _, normed = self.add_norm(hidden, delta, self.merge_norm)
        return self.merge2(F.gelu(self.merge1(normed.view(-1, MERGE_SIZE**2 * hidden.shape[1]))))


QWEN2_VL = Architecture(
    model_class="Qwen2VLForConditionalGeneration",
    patch_size=14,
    vision=Qwen2VLVision,
    output_width="hidden_size",
    mrope_section=(16, 24, 24),
    interleaved=False,
    positions=lambda config: PositionRule(),
    problems=lambda config: iter(()),
)
