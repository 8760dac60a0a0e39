"""The vision tower in packed passes, against transformers' own, one medium at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine import EngineOptions
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.models.qwen2_vl import Qwen2VLVision
from pipeline.engine.models.vision import Frames, frame_coordinates, patch_coordinates, plan_passes
from pipeline.engine.pixels import PixelTable
from pipeline.engine.sequence import Medium
from tests.unit.engine.tiny import make_medium


def media(count: int = 12) -> list[Medium]:
    rng = np.random.default_rng(5)
    return [make_medium(rng, "video" if i % 3 == 2 else "image", max_side=8) for i in range(count)]


@pytest.mark.parametrize("max_patches", [1, 4, 30, 64, 10_000])
def test_passes_hold_every_frame_once_within_the_budget(max_patches: int) -> None:
    found: dict[int, list[int]] = {}
    for frames in plan_passes(media(), max_patches):
        patches = sum(part.num_patches for part in frames)
        assert patches <= max_patches or (len(frames) == 1 and frames[0].stop - frames[0].start == 1)
        for part in frames:
            found.setdefault(id(part.medium), []).extend(range(part.start, part.stop))
    assert sorted(len(steps) for steps in found.values()) == sorted(m.grid_thw[0] for m in media())
    assert all(steps == list(range(len(steps))) for steps in found.values())


@pytest.mark.parametrize("max_patches", [1, 50, 10_000])
def test_packed_passes_equal_transformers_medium_by_medium(tiny_model: Any, max_patches: int) -> None:
    table = PixelTable(EngineOptions("tiny"), device=torch.device("cpu"), dtype=torch.float32)
    tower = Qwen2VLVision(tiny_model, SdpaAttention(), table)
    chosen = media()
    with torch.inference_mode():
        ours = {id(medium): tokens for medium, tokens in tower.encode(chosen, max_patches)}
        for medium in chosen:
            values = table(torch.from_numpy(medium.patches), medium.kind)
            grid = torch.tensor([medium.grid_thw])
            theirs = tiny_model.model.visual(values, grid_thw=grid).pooler_output
            torch.testing.assert_close(ours[id(medium)], theirs, rtol=1e-4, atol=1e-5)


def test_the_coordinates_of_a_grid_are_computed_once() -> None:
    image = make_medium(np.random.default_rng(1), "image")
    found = [patch_coordinates([Frames(image, 0, 1)]) for _ in range(3)]
    _, h, w = image.grid_thw
    blocks = [(2 * y + dy, 2 * x + dx) for y in range(h // 2) for x in range(w // 2) for dy in (0, 1) for dx in (0, 1)]
    assert [tuple(place) for place in found[0].tolist()] == blocks
    before = frame_coordinates.cache_info().misses
    assert frame_coordinates(h, w) is frame_coordinates(h, w)
    assert frame_coordinates.cache_info().misses == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixel_values_are_bit_equal_to_transformers_normalisation(dtype: torch.dtype) -> None:
    """As transformers does it: mean and deviation scaled by 255, float32, then the model's dtype."""
    patches = torch.arange(256, dtype=torch.uint8).repeat(588)[: 256 * 588].view(256, 588)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]) * (1.0 / (1 / 255))
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]) * (1.0 / (1 / 255))
    pixels = patches.view(256, 3, 1, 196).float().expand(-1, -1, 2, -1)
    expected = (pixels - mean.view(3, 1, 1)).div_(std.view(3, 1, 1)).reshape(256, 1176).to(dtype)
    table = PixelTable(EngineOptions("tiny"), device=torch.device("cpu"), dtype=dtype)
    assert torch.equal(table(patches, "image"), expected)
    both_halves = patches.view(256, 3, 1, 196).expand(-1, -1, 2, -1).reshape(256, 1176)
    assert torch.equal(table(both_halves, "video"), expected)


def test_the_checkpoint_s_own_mean_and_deviation_are_used() -> None:
    options = EngineOptions("tiny", image_mean=(0.0, 0.5, 1.0), image_std=(1.0, 0.5, 2.0))
    table = PixelTable(options, device=torch.device("cpu"), dtype=torch.float32)
    pixels = table(torch.full((2, 588), 255, dtype=torch.uint8), "image").view(2, 3, 2, 196)
    assert [pixels[:, channel].unique().tolist() for channel in range(3)] == [[1.0], [1.0], [0.0]]
