"""uint8 patches to pixel values on the model's device, bit-equal to transformers' in the model's dtype.

A table lookup: 256 values for each of three channels, computed once in float32 as transformers computes them and then
cast to the model's dtype, so no dtype can round differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from pipeline.engine.settings import CLIP_MEAN, CLIP_STD, EngineOptions


def pixel_table(
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    processor: Literal["torch", "pil"] = "torch",
) -> npt.NDArray[np.float32]:
    """Normalized value [3, 256] of each (channel, byte), bit-equal to transformers in float32; CLIP's if not given.

    Its two processors round in a different order: the torchvision one folds the 1/255 into mean and std, the PIL
    one multiplies in float64 first. In bfloat16 both give the same values.
    """
    byte = np.arange(256)
    mean32, std32 = (np.array(values, dtype=np.float32)[:, None] for values in (mean or CLIP_MEAN, std or CLIP_STD))
    if processor == "pil":
        rescaled = (byte.astype(np.float64) * (1 / 255)).astype(np.float32)
        table: npt.NDArray[np.float32] = (rescaled[None] - mean32) / std32
        return table
    scale = np.float32(255.0)
    table = (byte.astype(np.float32)[None] - mean32 * scale) / (std32 * scale)
    return table


class PixelTable:
    """The lookup on one device in one dtype."""

    def __init__(self, options: EngineOptions, *, device: torch.device, dtype: torch.dtype) -> None:
        table = pixel_table(options.image_mean, options.image_std, processor=options.image_processor)
        self.values = torch.tensor(table, dtype=torch.float32).to(device=device, dtype=dtype).reshape(-1)
        self.offsets = (torch.arange(3, dtype=torch.int32) * 256).view(3, 1).to(device)

    def __call__(self, patches: torch.Tensor, kind: str) -> torch.Tensor:
        """uint8 [N, 3 * P * P] of images, or [N, 6 * P * P] of videos -> [N, 6 * P * P], for P pixels a side."""
        num_patches = len(patches)
        index = patches.to(torch.int32).view(num_patches, 3, -1) + self.offsets
        pixels = self.values.index_select(0, index.reshape(-1))
        if kind == "image":
            # The two temporal halves of a still image are equal, so only one was sent.
            pixels = pixels.view(num_patches, 3, 1, -1).expand(-1, -1, 2, -1)
        return pixels.reshape(num_patches, -1)
