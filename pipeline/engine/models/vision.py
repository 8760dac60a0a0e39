"""Vision towers: patches of many media in one packed pass to visual tokens. What all families share.

    passes    media are cut into frames and packed up to the patch budget, frames of one size side by side
    pixels    uint8 patches are copied to the device and normalized there (pixels.py)
    frames    attention stays within a frame, so a long video can be spread over several passes

transformers' weights, our forward pass. Grids stay on the host, so nothing waits for the device.

    N patches   H heads   D head_dim   C embedding size
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.engine.attention.interface import AttentionBackend
from pipeline.engine.dense import Dense, dense
from pipeline.engine.device import upload
from pipeline.engine.kernels.eager import EAGER, EagerKernels
from pipeline.engine.models.mlp import Mlp
from pipeline.engine.pixels import PixelTable
from pipeline.engine.sequence import MERGE_SIZE, Medium


@dataclass
class Block:
    norm1: Any
    """nn.LayerNorm, or a module with a `weight` and a `variance_epsilon` for RMSNorm."""
    qkv: Dense
    out: Dense
    norm2: Any
    mlp: Mlp


@dataclass(frozen=True)
class Frames:
    """Temporal steps [start, stop) of one medium."""

    medium: Medium
    start: int
    stop: int

    @property
    def frame_patches(self) -> int:
        return self.medium.grid_thw[1] * self.medium.grid_thw[2]

    @property
    def num_patches(self) -> int:
        return (self.stop - self.start) * self.frame_patches

    @property
    def patches(self) -> npt.NDArray[np.uint8]:
        return self.medium.patches[self.start * self.frame_patches : self.stop * self.frame_patches]


def plan_passes(media: Sequence[Medium], max_patches: int) -> list[list[Frames]]:
    """Pack whole frames into passes of at most `max_patches`; a larger frame gets a pass of its own."""
    passes: list[list[Frames]] = [[]]
    room = max_patches
    # Sorted, so that frames of one size are neighbours and attend as one batch.
    for medium in sorted(media, key=lambda m: (m.kind, m.grid_thw[1] * m.grid_thw[2])):
        size = medium.grid_thw[1] * medium.grid_thw[2]
        start = 0
        while start < medium.grid_thw[0]:
            count = min(room // size, medium.grid_thw[0] - start)
            if count <= 0:
                if passes[-1]:
                    passes.append([])
                    room = max_patches
                    continue
                count = 1
            passes[-1].append(Frames(medium, start, start + count))
            room -= count * size
            start += count
    return [frames for frames in passes if frames]


class VisionModel(ABC):
    """The tower of one family; a subclass knows its blocks and what comes after them."""

    num_deep = 0
    """Layers of the text model, from the first on, to which the tower hands features of their own."""

    def __init__(
        self,
        model: Any,
        attention: AttentionBackend,
        pixels: PixelTable,
        *,
        release: bool = False,
    ) -> None:
        """`model` is transformers' own, of the family's class. `release`: it loses the weights of which this holds a
        copy."""
        self._release = release
        tower = model.model.visual
        config = model.config.vision_config
        self.attention = attention
        self.pixels = pixels
        self.kernels: EagerKernels = EAGER
        self.num_heads: int = config.num_heads
        # The convolution's kernel is as large as its stride, so it is one product over flattened patches.
        self.embed = Dense(tower.patch_embed.proj.weight.flatten(1), tower.patch_embed.proj.bias)
        self.head_dim: int = self.embed.out_features // self.num_heads
        self.blocks = [self.make_block(block) for block in tower.blocks]
        self.device = self.embed.device
        theta = float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0))
        spatial = self.head_dim // 2
        steps = torch.arange(0, spatial, 2, dtype=torch.float32)
        self.inv_freq = (1.0 / (theta ** (steps / spatial))).to(self.device)
        on_gpu = self.device.type == "cuda"
        self._copies: Any = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]

    def dense(self, *linears: Any) -> Dense:
        return dense(*linears, release=self._release)

    @property
    def mlp_width(self) -> int:
        return self.blocks[0].mlp.width

    def encode(self, media: Sequence[Medium], max_patches: int) -> Iterator[tuple[Medium, torch.Tensor]]:
        """Each medium with its visual tokens [tokens, (1 + num_deep) * text width], once all its frames are done."""
        parts: dict[int, list[torch.Tensor]] = {}
        for frames in plan_passes(media, max_patches):
            merged = self.run(frames)
            tokens = [part.num_patches // MERGE_SIZE**2 for part in frames]
            for part, embedding in zip(frames, torch.split(merged, tokens), strict=True):
                mine = parts.setdefault(id(part.medium), [])
                mine.append(embedding)
                if part.stop == part.medium.grid_thw[0]:
                    yield part.medium, mine[0].clone() if len(mine) == 1 else torch.cat(mine)
                    del parts[id(part.medium)]

    @abstractmethod
    def make_block(self, block: Any) -> Block:
        """Of transformers' block."""

    @abstractmethod
    def run(self, frames: Sequence[Frames]) -> torch.Tensor:
        """One packed pass: visual tokens of all frames [N / 4, (1 + num_deep) * text width]."""

    def run_block(
        self,
        block: Block,
        hidden: torch.Tensor,  # [N, C]
        delta: torch.Tensor | None,
        rotation: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden, delta) after a block; delta is added to the hidden states by the next norm."""
        hidden, normed = self.add_norm(hidden, delta, block.norm1)
        qkv = block.qkv(normed).view(hidden.shape[0], 3, self.num_heads, self.head_dim)
        q, k, v = self.kernels.rotate_vision(qkv, *rotation)
        delta = block.out(self.attention.vision(q, k, v).reshape(hidden.shape[0], -1))
        hidden, normed = self.add_norm(hidden, delta, block.norm2)
        return hidden, block.mlp(normed, self.kernels)

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, norm: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual sum, and its norm."""
        if isinstance(norm, torch.nn.LayerNorm):
            return self.kernels.add_layer_norm(hidden, delta, norm)
        return self.kernels.add_rms_norm(hidden, delta, norm.weight, norm.variance_epsilon)

    def begin_frames(self, frames: Sequence[Frames]) -> None:
        """Attention within each frame, for the blocks that follow."""
        self.attention.begin_vision(
            [part.frame_patches for part in frames for _ in range(part.start, part.stop)], self.device
        )

    def pixel_values(self, frames: Sequence[Frames]) -> torch.Tensor:
        """[N, 6 * P * P] for patches of P pixels a side."""
        values = []
        for kind in ("image", "video"):
            mine = [part.patches for part in frames if part.medium.kind == kind]
            if mine:
                values.append(self.pixels(self._upload(mine), kind))
        return values[0] if len(values) == 1 else torch.cat(values)  # plan_passes puts images first

    def _upload(self, parts: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
        """All parts in one tensor on the device, copied to a GPU from pinned memory on a separate stream, while earlier
        passes compute."""
        total = sum(len(part) for part in parts)
        on_gpu = self.device.type == "cuda"
        staging = torch.empty((total, parts[0].shape[1]), dtype=torch.uint8, pin_memory=on_gpu)
        np.concatenate(parts, out=staging.numpy())
        if not on_gpu:
            return staging
        with torch.cuda.stream(self._copies):
            patches = staging.to(self.device, non_blocking=True)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self._copies)
        patches.record_stream(compute)
        return patches

    def rotation(self, coordinates: npt.NDArray[np.int32]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [N, 1, 1, D] of (row, column) [N, 2]: half of the angles by row, half by column."""
        angles = (upload(coordinates, self.device).float()[:, :, None] * self.inv_freq).flatten(1)  # [N, D / 2]
        angles = torch.cat([angles, angles], dim=-1)[:, None, None]
        return angles.cos(), angles.sin()


def patch_coordinates(frames: Sequence[Frames]) -> npt.NDArray[np.int32]:
    """(row, column) [patches, 2] in merge-block order, the same for every frame of a medium."""
    return np.concatenate(
        [np.tile(frame_coordinates(*part.medium.grid_thw[1:]), (part.stop - part.start, 1)) for part in frames]
    )


@lru_cache(maxsize=256)
def frame_coordinates(h: int, w: int) -> npt.NDArray[np.int32]:
    grid = np.indices((h, w), dtype=np.int32).reshape(2, h // 2, 2, w // 2, 2)
    coordinates = np.ascontiguousarray(grid.transpose(1, 3, 2, 4, 0)).reshape(-1, 2)
    coordinates.setflags(write=False)
    return coordinates
