"""smart_resize, resizing, patches and the pixel table against transformers and against plain loops.

The torchvision processors' values are in tests/golden; here is what can be asked live: transformers' PIL processor.
Where the two published references differ from each other, ours is transformers'. qwen-vl-utils 0.0.14 differs so:

- smart_resize raises each side to 28 before it compares areas, transformers only after: another size in 12 % of
  100,000 sizes drawn evenly on a logarithmic scale, all of them with a side below 28 pixels; see the last test.
- frames are `linspace(0, total - 1, n).round()`, which ends on the last frame; transformers' are
  `arange(0, total, total / n).int()`, which does not: of 900 frames 0, 15, 30, 46 ... 899 against 0, 15, 30 ... 885.
- a segment includes the frame at its end, and is an error where it holds fewer than two frames.
- RGBA is laid on white, but the transparency of every other mode is dropped.
"""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference

from pipeline.conversation import MediumSettings
from pipeline.errors import AspectRatioError, UnsupportedMedia
from pipeline.preprocess.decode import see_medium
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.patches import (
    FACTOR,
    grid_thw,
    num_visual_tokens,
    patchify_image,
    patchify_video,
    pixel_table,
    resize_frames,
    smart_resize,
    video_max_pixels,
)
from tests.unit.preprocess.golden import cases

MAX_PIXELS = 12_845_056


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_smart_resize_equals_transformers_for_a_hundred_thousand_sizes() -> None:
    dice = random.Random(1)
    for _ in range(100_000):
        height, width = (round(2 ** dice.uniform(0, 14)) for _ in range(2))
        if max(height, width) > 200 * min(height, width):
            continue
        bounds = {
            "min_pixels": dice.choice([784, 3136, 100_352]),
            "max_pixels": dice.choice([28 * 28 * 1280, 602_112, MAX_PIXELS]),
        }
        expected = reference.smart_resize(height, width, **bounds)
        assert smart_resize(height, width, **bounds) == expected, (height, width, bounds)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (56, 56)),
        ((27, 27), (56, 56)),
        ((1, 200), (28, 812)),
        ((13, 2600), (28, 812)),
        ((14, 14), (56, 56)),  # 14 / 28 rounds to 0, as Python rounds halves to even
        ((42, 42), (56, 56)),
        ((98, 98), (112, 112)),
        ((1024, 1024), (1036, 1036)),
        ((3000, 4000), (3004 // 28 * 28, 4004)),
    ],
)
def test_smart_resize_of_tiny_and_long_sizes_is_pinned(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*size, min_pixels=3136, max_pixels=MAX_PIXELS) == expected
    assert smart_resize(*size[::-1], min_pixels=3136, max_pixels=MAX_PIXELS) == expected[::-1]


def test_smart_resize_refuses_what_the_model_cannot_see() -> None:
    with pytest.raises(AspectRatioError, match=r"2613x13 pixels is 201:1; the model takes at most 200:1"):
        smart_resize(13, 2613, min_pixels=3136, max_pixels=MAX_PIXELS)
    with pytest.raises(UnsupportedMedia, match="at least 1"):
        smart_resize(0, 5, min_pixels=3136, max_pixels=MAX_PIXELS)
    with pytest.raises(UnsupportedMedia, match="set min_pixels to at least 784"):
        smart_resize(5, 5, min_pixels=0, max_pixels=MAX_PIXELS)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 64), st.integers(64, 16384))
@settings(max_examples=300, deadline=None)
def test_resized_sides_are_multiples_of_28_within_the_bounds(height: int, width: int, low: int, high: int) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    least, most = low * FACTOR * FACTOR, high * FACTOR * FACTOR
    resized_height, resized_width = smart_resize(height, width, min_pixels=least, max_pixels=most)
    assert resized_height % FACTOR == resized_width % FACTOR == 0 and resized_height and resized_width
    if height * width > 2 * most and min(resized_height, resized_width) > FACTOR:
        assert resized_height * resized_width <= most
    if height * width < least / 2:
        assert resized_height * resized_width >= least


@pytest.mark.parametrize("kind", ["image", "video"])
def test_patches_stand_where_a_plain_loop_puts_them(kind: str) -> None:
    dice = np.random.default_rng(3)
    frames = dice.integers(0, 256, (1 if kind == "image" else 4, 56, 84, 3), dtype=np.uint8)
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
    assert grid_thw(3, 28, 28) == (2, 2, 2) and grid_thw(1, 28, 28) == (1, 2, 2)
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


def test_many_frames_are_resized_in_parts_as_they_are_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.random.default_rng(7).integers(0, 256, (5, 60, 44, 3), dtype=np.uint8)
    at_once = resize_frames(frames, 84, 56)
    monkeypatch.setattr("pipeline.preprocess.patches._RESIZE_CHUNK_PIXELS", 60 * 44 * 2)
    assert np.array_equal(resize_frames(frames, 84, 56), at_once)


def test_the_total_pixel_cap_is_an_even_share_but_never_below_the_floor() -> None:
    bounds = {"min_pixels": 100_352, "max_pixels": 602_112, "total_pixels": 90_316_800}
    assert video_max_pixels(num_frames=10, **bounds) == 602_112
    assert video_max_pixels(num_frames=600, **bounds) == 90_316_800 * 2 // 600
    assert video_max_pixels(num_frames=768 * 4, **bounds) == int(100_352 * 1.05)


def test_images_are_bit_equal_to_the_pil_processor_in_every_mode_and_size() -> None:
    table = pixel_table(resize="pil")
    for case in cases.image_cases()[:160]:
        image = cases.make_image(case)
        size = {"shortest_edge": case.min_pixels, "longest_edge": case.max_pixels}
        theirs = reference.Qwen2VLImageProcessorPil(size=size)(image, return_tensors="np")
        options = MediaOptions(resize="pil", min_pixels=case.min_pixels, max_pixels=case.max_pixels)
        seen = see_medium("image", cases.encode(image), MediumSettings(), options, source="")
        assert list(seen.receipt.grid_thw) == theirs["image_grid_thw"][0].tolist(), cases.key(case)
        assert np.array_equal(pixel_values(seen.patches, table), theirs["pixel_values"]), cases.key(case)


def test_a_jpeg_is_bit_equal_to_the_pil_processor() -> None:
    file = io.BytesIO()
    Image.fromarray(cases.make_video(cases.video_cases()[0])[0]).resize((500, 333)).save(file, "JPEG")
    theirs = reference.Qwen2VLImageProcessorPil()(Image.open(file), return_tensors="np")
    options = MediaOptions(resize="pil", max_pixels=28 * 28 * 1280)
    seen = see_medium("image", file.getvalue(), MediumSettings(), options, source="")
    assert np.array_equal(pixel_values(seen.patches, pixel_table(resize="pil")), theirs["pixel_values"])


def test_both_tables_give_the_same_bfloat16_values() -> None:
    torchvision, pil = (torch.from_numpy(pixel_table(resize=resize)).bfloat16() for resize in ("torch", "pil"))
    assert torch.equal(torchvision, pil)


def pixel_values(patches: npt.NDArray[np.uint8], table: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    bytes_of = patches.reshape(len(patches), 3, 1, 196)
    values = np.stack([table[channel][bytes_of[:, channel]] for channel in range(3)], axis=1)
    return np.repeat(values, 2, axis=2).reshape(len(patches), -1)


@pytest.mark.parametrize(
    ("size", "bounds", "ours", "qwen_vl_utils"),
    [
        ((1, 191), (3136, MAX_PIXELS), (28, 784), (28, 196)),
        ((8, 60), (784, MAX_PIXELS), (28, 84), (28, 56)),
        ((10, 9), (784, 602_112), (56, 28), (28, 28)),
        ((6, 209), (784, MAX_PIXELS), (28, 168), (28, 196)),
    ],
)
def test_where_the_two_references_differ_ours_is_that_of_transformers(
    size: tuple[int, int], bounds: tuple[int, int], ours: tuple[int, int], qwen_vl_utils: tuple[int, int]
) -> None:
    least, most = bounds
    assert smart_resize(*size, min_pixels=least, max_pixels=most) == ours != qwen_vl_utils
    assert reference.smart_resize(*size, min_pixels=least, max_pixels=most) == ours
