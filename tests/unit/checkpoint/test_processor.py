"""What a checkpoint's processor files state: bounds in each spelling, normalization, and patches that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.families.qwen2_vl import QWEN2_VL
from pipeline.checkpoint.processor import read_processor
from pipeline.errors import CheckpointError


def checkpoint(folder: Path, **files: dict[str, Any]) -> str:
    for name, content in {"config": {"model_type": "qwen2_vl"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, (QWEN2_VL.min_pixels, QWEN2_VL.max_pixels)),
        ({"min_pixels": 6272, "max_pixels": 50_176}, (6272, 50_176)),
        ({"size": {"shortest_edge": 6272, "longest_edge": 50_176}}, (6272, 50_176)),
        ({"size": {"min_pixels": 6272, "max_pixels": 50_176}}, (6272, 50_176)),
        ({"max_pixels": 50_176, "size": {"longest_edge": 100_352}}, (QWEN2_VL.min_pixels, 50_176)),
    ],
)
def test_the_bounds_are_those_that_the_checkpoint_states(
    tmp_path: Path, stated: dict[str, Any], expected: tuple[int, int]
) -> None:
    found = read_processor(checkpoint(tmp_path, preprocessor_config={**stated, "image_mean": [0.1, 0.2, 0.3]}))
    assert (found.min_pixels, found.max_pixels) == expected
    assert (found.video_min_pixels, found.video_max_pixels) == (QWEN2_VL.video_min_pixels, QWEN2_VL.video_max_pixels)
    assert (found.image_mean, found.image_std) == ((0.1, 0.2, 0.3), QWEN2_VL.image_std)


def test_a_video_has_bounds_of_its_own(tmp_path: Path) -> None:
    video = {"size": {"shortest_edge": 12_544, "longest_edge": 25_088}}
    found = read_processor(checkpoint(tmp_path, preprocessor_config={}, video_preprocessor_config=video))
    assert (found.video_min_pixels, found.video_max_pixels) == (12_544, 25_088)
    assert (found.min_pixels, found.max_pixels) == (QWEN2_VL.min_pixels, QWEN2_VL.max_pixels)


@pytest.mark.parametrize("name", ["patch_size", "temporal_patch_size", "merge_size"])
def test_other_patches_than_the_familys_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"with {name} 16; Qwen2-VL has "):
        read_processor(checkpoint(tmp_path, preprocessor_config={name: 16}))
    with pytest.raises(CheckpointError, match=r"can't find preprocessor_config\.json"):
        (tmp_path / "preprocessor_config.json").unlink()
        read_processor(str(tmp_path))
