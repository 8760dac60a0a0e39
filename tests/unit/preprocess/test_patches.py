"""Resizing, patches and the pixel table against transformers and against plain loops.

The torchvision processors' values are in golden/; this file compares with transformers' PIL processor, which runs here.
"""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference

from pipeline.conversation import MediumSettings
from pipeline.engine.pixels import pixel_table
from pipeline.preprocess import patches as patches_module
from pipeline.preprocess.patches import _interpolate, resize_frames
from pipeline.preprocess.size import grid_thw, num_visual_tokens
from tests.decoding import see_medium
from tests.options import media_options
from tests.unit.preprocess.golden import cases

patchify_image = partial(patches_module.patchify_image, patch_size=14)
patchify_video = partial(patches_module.patchify_video, patch_size=14)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_patches_stand_where_a_plain_loop_puts_them(kind: str) -> None:
    rng = np.random.default_rng(3)
    frames = rng.integers(0, 256, (1 if kind == "image" else 4, 56, 84, 3), dtype=np.uint8)
    patches = patchify_image(frames[0]) if kind == "image" else patchify_video(frames)
    expected = []
    halves = 1 if kind == "image" else 2
    for step in range(0, len(frames), halves):
        for block_row in range(2):
            for block_column in range(3):
                for inner in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    top, left = 28 * block_row + 14 * inner[0], 28 * block_column + 14 * inner[1]
                    piece = frames[step : step + halves, top : top + 14, left : left + 14]
                    expected.append(piece.transpose(3, 0, 1, 2).reshape(-1))
    assert np.array_equal(patches, np.stack(expected))


def test_an_odd_frame_at_the_end_is_repeated_and_one_frame_makes_one_step() -> None:
    frames = np.random.default_rng(4).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
    assert np.array_equal(patchify_video(frames), patchify_video(frames[[0, 1, 2, 2]]))
    assert np.array_equal(patchify_video(frames[:1]), patchify_video(frames[[0, 0]]))
    assert grid_thw(3, 28, 28, patch_size=14) == (2, 2, 2) and grid_thw(1, 28, 28, patch_size=14) == (1, 2, 2)
    assert num_visual_tokens((2, 2, 2)) == 2


def test_patches_go_into_the_buffer_that_is_given() -> None:
    image = np.random.default_rng(5).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    buffer = np.zeros((20, 588), dtype=np.uint8)
    out = patchify_image(image, buffer[4:])
    assert np.shares_memory(out, buffer) and np.array_equal(buffer[4:], patchify_image(image)) and not buffer[:4].any()


def test_read_only_frames_are_resized_without_a_warning_and_without_being_changed(recwarn: Any) -> None:
    frames = np.random.default_rng(6).integers(0, 256, (2, 40, 30, 3), dtype=np.uint8)
    locked = frames.copy()
    locked.flags.writeable = False
    assert np.array_equal(resize_frames(locked, 28, 56), resize_frames(frames, 28, 56))
    assert np.array_equal(locked, frames) and not recwarn.list


def test_a_single_frame_is_resized_in_the_fast_channels_last_layout() -> None:
    frame = np.random.default_rng(8).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    assert resize_frames(frame[None], 28, 56)[0].flags.c_contiguous


@pytest.mark.parametrize(
    ("chunk_pixels", "sizes"),
    [(60 * 44 * 5, [5]), (60 * 44 * 5 - 1, [4, 1]), (60 * 44 * 2, [2, 2, 1]), (60 * 44 - 1, [1] * 5)],
)
def test_many_or_large_frames_are_resized_in_parts_as_they_are_at_once(
    monkeypatch: pytest.MonkeyPatch, chunk_pixels: int, sizes: list[int]
) -> None:
    frames = np.random.default_rng(7).integers(0, 256, (5, 60, 44, 3), dtype=np.uint8)
    at_once = resize_frames(frames, 84, 56)
    parts: list[int] = []

    def interpolate(part: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
        parts.append(len(part))
        return _interpolate(part, height, width)

    monkeypatch.setattr("pipeline.preprocess.patches._RESIZE_CHUNK_PIXELS", chunk_pixels)
    monkeypatch.setattr("pipeline.preprocess.patches._interpolate", interpolate)
    assert np.array_equal(resize_frames(frames, 84, 56), at_once)
    assert parts == sizes  # no more pixels at once than allowed, and no part smaller than it need be


@pytest.mark.parametrize("resize", ["torch", "pil"])
def test_frames_of_the_size_already_are_handed_back_and_others_are_not(resize: Any) -> None:
    frames = np.random.default_rng(9).integers(0, 256, (2, 28, 56, 3), dtype=np.uint8)
    assert resize_frames(frames, 28, 56, resize=resize) is frames
    assert resize_frames(frames, 56, 28, resize=resize).shape == (2, 56, 28, 3)


def test_images_are_bit_equal_to_the_pil_processor_in_every_mode_and_size() -> None:
    table = pixel_table(processor="pil")
    for case in cases.image_cases()[:160]:
        image = cases.make_image(case)
        size = {"shortest_edge": case.min_pixels, "longest_edge": case.max_pixels}
        theirs = reference.Qwen2VLImageProcessorPil(size=size)(image, return_tensors="np")
        options = media_options(resize="pil", min_pixels=case.min_pixels, max_pixels=case.max_pixels)
        seen = see_medium("image", cases.encode(image), MediumSettings(), options, source="")
        assert list(seen.receipt.grid_thw) == theirs["image_grid_thw"][0].tolist(), cases.key(case)
        assert np.array_equal(pixel_values(seen.patches, table), theirs["pixel_values"]), cases.key(case)


def test_a_jpeg_is_bit_equal_to_the_pil_processor() -> None:
    file = io.BytesIO()
    Image.fromarray(cases.make_video(cases.video_cases()[0])[0]).resize((500, 333)).save(file, "JPEG")
    theirs = reference.Qwen2VLImageProcessorPil()(Image.open(file), return_tensors="np")
    options = media_options(resize="pil", max_pixels=28 * 28 * 1280)
    seen = see_medium("image", file.getvalue(), MediumSettings(), options, source="")
    assert np.array_equal(pixel_values(seen.patches, pixel_table(processor="pil")), theirs["pixel_values"])


def test_both_tables_give_the_same_bfloat16_values() -> None:
    torchvision, pil = (torch.from_numpy(pixel_table(processor=resize)).bfloat16() for resize in ("torch", "pil"))
    assert torch.equal(torchvision, pil)


def pixel_values(patches: npt.NDArray[np.uint8], table: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    bytes_of = patches.reshape(len(patches), 3, 1, 196)
    values = np.stack([table[channel][bytes_of[:, channel]] for channel in range(3)], axis=1)
    return np.repeat(values, 2, axis=2).reshape(len(patches), -1)
