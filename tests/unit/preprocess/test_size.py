"""The size at which a medium is shown, against transformers and against numbers computed by hand.

Where the two published references differ from each other, ours is transformers'. qwen-vl-utils 0.0.14 differs so:

- smart_resize raises each side to 28 before it compares areas, transformers only after: another size in 12 % of
  100,000 sizes drawn evenly on a logarithmic scale, all of them with a side below 28 pixels; see the last test.
- frames are `linspace(0, total - 1, n).round()`, which ends on the last frame; transformers' are
  `arange(0, total, total / n).int()`, which does not: of 900 frames 0, 15, 30, 46 ... 899 against 0, 15, 30 ... 885.
- a segment includes the frame at its end, and is an error where it holds fewer than two frames.
- RGBA is laid on white, but the transparency of every other mode is dropped.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference

from pipeline.conversation import MediumSettings
from pipeline.errors import AspectRatioError, DecompressionBomb, UnsupportedMedia
from pipeline.preprocess.size import ShownSize, check_source_size, fit_row, pixel_bounds, smart_resize, video_max_pixels
from tests.options import media_options

MAX_PIXELS = 12_845_056
FACTOR = 28


def test_smart_resize_equals_transformers_for_a_hundred_thousand_sizes() -> None:
    rng = random.Random(1)
    for _ in range(100_000):
        height, width = (round(2 ** rng.uniform(0, 14)) for _ in range(2))
        if max(height, width) > 200 * min(height, width):
            continue
        bounds = {
            "min_pixels": rng.choice([784, 3136, 100_352]),
            "max_pixels": rng.choice([28 * 28 * 1280, 602_112, MAX_PIXELS]),
        }
        expected = reference.smart_resize(height, width, **bounds)
        assert smart_resize(height, width, factor=FACTOR, **bounds) == expected, (height, width, bounds)


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
    assert smart_resize(*size, factor=FACTOR, min_pixels=3136, max_pixels=MAX_PIXELS) == expected
    assert smart_resize(*size[::-1], factor=FACTOR, min_pixels=3136, max_pixels=MAX_PIXELS) == expected[::-1]


def test_smart_resize_refuses_what_the_model_cannot_see() -> None:
    with pytest.raises(AspectRatioError, match=r"2613x13 pixels is 201:1; the model takes at most 200:1"):
        smart_resize(13, 2613, factor=FACTOR, min_pixels=3136, max_pixels=MAX_PIXELS)
    with pytest.raises(UnsupportedMedia, match="at least 1"):
        smart_resize(0, 5, factor=FACTOR, min_pixels=3136, max_pixels=MAX_PIXELS)
    with pytest.raises(UnsupportedMedia, match="set min_pixels to at least 784"):
        smart_resize(5, 5, factor=FACTOR, min_pixels=0, max_pixels=MAX_PIXELS)


def test_a_source_is_refused_by_its_pixels_and_its_shape_before_it_is_decoded() -> None:
    options = media_options(max_image_pixels=2000)
    check_source_size("image", 200, 1, options)
    check_source_size("video", 40, 50, options)
    for kind, words in (("image", "the image has 40x51 = 2,040 pixels"), ("video", "a frame of the video has 40x51")):
        with pytest.raises(DecompressionBomb, match=f"{words}.*at most 2,000 are decoded"):
            check_source_size(kind, 40, 51, options)  # type: ignore[arg-type]
    with pytest.raises(AspectRatioError, match="201x1 pixels is 201:1"):
        check_source_size("image", 201, 1, options)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 64), st.integers(64, 16384))
@settings(max_examples=300, deadline=None)
def test_resized_sides_are_multiples_of_28_within_the_bounds(height: int, width: int, low: int, high: int) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    least, most = low * FACTOR * FACTOR, high * FACTOR * FACTOR
    resized_height, resized_width = smart_resize(height, width, factor=FACTOR, min_pixels=least, max_pixels=most)
    assert resized_height % FACTOR == resized_width % FACTOR == 0 and resized_height and resized_width
    if height * width > 2 * most and min(resized_height, resized_width) > FACTOR:
        assert resized_height * resized_width <= most
    if height * width < least / 2:
        assert resized_height * resized_width >= least


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (10, 602_112),  # the frames' own bound
        (300, 602_112),  # 150 steps of 602,112 pixels are the whole total
        (301, 600_111),  # 180,633,600 / 301 = 600,111.6
        (600, 301_056),  # half as many pixels in twice as many frames
        (1800, 105_369),  # an even share is 100,352: the floor of 1.05 * 100,352 = 105,369.6 wins
        (3072, 105_369),
    ],
)
def test_many_frames_share_the_total_evenly_down_to_a_floor(num_frames: int, expected: int) -> None:
    bounds = {"min_pixels": 100_352, "max_pixels": 602_112, "total_pixels": 90_316_800}
    assert video_max_pixels(num_frames=num_frames, **bounds) == expected


def test_a_rows_max_pixels_lowers_a_videos_least_area_so_that_the_cap_stays_within_it() -> None:
    # By default a frame has at least 100,352 pixels. The row allows 12,544; 11,946 * 1.05 = 12,543.3 keeps within that.
    options, row = media_options(), MediumSettings(max_pixels=12_544)
    assert pixel_bounds("video", row, options) == (11_946, 12_544)
    long = ShownSize("video", 560, 560, 30_000, row, options)
    assert long.resized == (84, 84)  # 112 * 112 = 12,544 is a pixel above 12,543
    short = ShownSize("video", 560, 560, 4, row, options)
    assert short.resized == (112, 112)


def test_a_row_bound_within_the_jobs_leaves_the_other_bound_alone() -> None:
    options = media_options(min_pixels=3136, max_pixels=1_003_520)
    assert pixel_bounds("image", MediumSettings(max_pixels=12_544), options) == (3136, 12_544)
    assert pixel_bounds("image", MediumSettings(max_pixels=1568), options) == (1568, 1568)
    assert pixel_bounds("image", MediumSettings(min_pixels=2_000_000), options) == (2_000_000, 2_000_000)


def test_a_rows_budget_may_show_a_picture_below_the_least_area() -> None:
    least = ShownSize("image", 56, 56, 1, MediumSettings(), media_options(min_pixels=8 * FACTOR**2))
    assert least.num_visual_tokens == 9
    fit_row([SimpleNamespace(size=least)], 4)
    assert least.resized == (56, 56) and least.note is not None


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
    assert smart_resize(*size, factor=FACTOR, min_pixels=least, max_pixels=most) == ours != qwen_vl_utils
    assert reference.smart_resize(*size, min_pixels=least, max_pixels=most) == ours
