"""Our patches, after the device-side map, against what transformers' torchvision processors made of the same media."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.checkpoint.families.qwen3_vl import QWEN3_VL
from pipeline.conversation import MediumSettings
from pipeline.engine.pixels import pixel_table
from pipeline.errors import SettingError
from pipeline.preprocess.patches import patchify_video, resize_frames
from pipeline.preprocess.size import ShownSize, grid_thw, smart_resize, video_max_pixels
from pipeline.preprocess.video.timing import evenly_spaced, num_sampled_frames
from tests.decoding import see_medium
from tests.options import media_options
from tests.unit.preprocess.golden import cases

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
TABLE = pixel_table()
QWEN3 = media_options(QWEN3_VL)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def digest(values: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, dtype=np.float32).tobytes()).hexdigest()[:16]


def pixel_values(
    patches: npt.NDArray[np.uint8], halves: int, table: npt.NDArray[np.float32] = TABLE
) -> npt.NDArray[np.float32]:
    """Patches [N, 3 * halves * P * P] by the table, as transformers lays them out: [N, 3 * 2 * P * P]."""
    bytes_of = patches.reshape(len(patches), 3, halves, -1)
    values = np.stack([table[channel][bytes_of[:, channel]] for channel in range(3)], axis=1)
    if halves == 1:
        values = np.repeat(values, 2, axis=2)
    return values.reshape(len(patches), -1)


def test_images_are_bit_equal_to_the_torchvision_processor_in_every_mode_and_size() -> None:
    wrong = []
    for case in cases.image_cases():
        options = media_options(min_pixels=case.min_pixels, max_pixels=case.max_pixels)
        data = cases.encode(cases.make_image(case))
        seen = see_medium("image", data, MediumSettings(), options, source="golden")
        ours = [*seen.receipt.grid_thw, digest(pixel_values(seen.patches, 1))]
        if ours != GOLDEN["images"][cases.key(case)]:
            wrong.append((cases.key(case), ours, GOLDEN["images"][cases.key(case)]))
    assert not wrong, f"{len(wrong)} of {len(GOLDEN['images'])} differ, first {wrong[:3]}"


@pytest.mark.parametrize("part", [slice(30), pytest.param(slice(30, None), marks=pytest.mark.slow)])
def test_videos_are_bit_equal_to_the_torchvision_processor_with_its_total_pixel_cap(part: slice) -> None:
    wrong = []
    for case in cases.video_cases()[part]:
        most = video_max_pixels(
            num_frames=case.num_frames,
            min_pixels=case.min_pixels,
            max_pixels=case.max_pixels,
            total_pixels=int((case.max_video_tokens or 0) * 28 * 28 * 0.9),
        )
        height, width = smart_resize(case.height, case.width, factor=28, min_pixels=case.min_pixels, max_pixels=most)
        patches = patchify_video(resize_frames(cases.make_video(case), height, width), patch_size=14)
        ours = [*grid_thw(case.num_frames, height, width, patch_size=14), digest(pixel_values(patches, 2))]
        if ours != GOLDEN["videos"][cases.key(case)]:
            wrong.append((cases.key(case), ours, GOLDEN["videos"][cases.key(case)]))
    assert not wrong, f"{len(wrong)} of {len(GOLDEN['videos'])} differ, first {wrong[:3]}"


@pytest.mark.parametrize("part", [slice(20), pytest.param(slice(20, None), marks=pytest.mark.slow)])
def test_images_are_bit_equal_to_qwen3_vls_processor(part: slice) -> None:
    table, wrong = pixel_table(QWEN3_VL.image_mean, QWEN3_VL.image_std), []
    for case in cases.image_cases(200, factor=32)[part]:
        options = replace(QWEN3, min_pixels=case.min_pixels, max_pixels=case.max_pixels)
        seen = see_medium("image", cases.encode(cases.make_image(case)), MediumSettings(), options, source="golden")
        ours = [*seen.receipt.grid_thw, digest(pixel_values(seen.patches, 1, table))]
        if ours != GOLDEN["qwen3_vl_images"][cases.key(case)]:
            wrong.append((cases.key(case), ours))
    assert not wrong, f"{len(wrong)} differ, first {wrong[:3]}"


@pytest.mark.parametrize("part", [slice(10), pytest.param(slice(10, None), marks=pytest.mark.slow)])
def test_videos_are_bit_equal_to_qwen3_vls_processor_with_bounds_on_all_frames(part: slice) -> None:
    table, wrong = pixel_table(QWEN3_VL.image_mean, QWEN3_VL.image_std), []
    for case in cases.total_cases()[part]:
        family = replace(QWEN3_VL, video_min_pixels=case.min_pixels)
        options = replace(QWEN3, family=family, video_total_pixels=case.max_pixels)
        size = ShownSize("video", case.height, case.width, case.num_frames, MediumSettings(), options)
        patches = patchify_video(resize_frames(cases.make_video(case), *size.resized), patch_size=16)
        ours = [*size.grid_thw, digest(pixel_values(patches, 2, table))]
        if ours != GOLDEN["qwen3_vl_videos"][cases.key(case)]:
            wrong.append((cases.key(case), ours))
    assert not wrong, f"{len(wrong)} differ, first {wrong[:3]}"


@pytest.mark.parametrize("case", cases.sampling_cases(), ids=cases.key)
def test_the_sampled_frames_are_those_of_transformers(case: cases.SamplingCase) -> None:
    def sample() -> list[int]:
        count = num_sampled_frames(
            case.total,
            case.total / case.source_fps,
            fps=case.fps,
            num_frames=case.num_frames,
            min_frames=4,
            max_frames=768,
        )
        return evenly_spaced(case.total, count)

    expected = GOLDEN["samples"][cases.key(case)]
    if expected is None:
        with pytest.raises(SettingError):
            sample()
        return
    indices = sample()
    assert indices[-1] < case.total
    if expected[1] == case.total:  # rounding led transformers one place past the end, where it finds no frame
        indices.append(case.total)
    assert [len(indices), indices[-1], digest(np.array(indices))] == expected
