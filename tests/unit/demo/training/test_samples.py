"""The job's own decoding sees in the demo's files what training and evaluation saw."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.conversation import MediumSettings
from pipeline.demo.clips import encode_clip
from pipeline.demo.scenes import Picture, draw_clip, draw_picture
from pipeline.demo.tasks import example
from pipeline.demo.training import recipe
from pipeline.demo.training.samples import see_media, tokenize_example
from pipeline.demo.training.tokens import write_tokenizer
from pipeline.preprocess.prompt import ChatTokenizer
from tests.decoding import see_medium
from tests.options import media_options

OPTIONS = media_options(
    min_pixels=recipe.IMAGE_MIN_PIXELS,
    max_pixels=recipe.IMAGE_MAX_PIXELS,
    video_min_pixels=recipe.VIDEO_MIN_PIXELS,
    video_max_pixels=recipe.VIDEO_MAX_PIXELS,
    fps=recipe.VIDEO_FPS,
    min_frames=recipe.VIDEO_MIN_FRAMES,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return ChatTokenizer(str(folder))


def test_pictures(tokenizer: ChatTokenizer) -> None:
    for index in range(10):
        made = example("compare", "held-out", 0, index)
        for picture, medium in zip(made.media, tokenize_example(made, tokenizer, vision_id=True).media, strict=True):
            assert isinstance(picture, Picture)
            file = io.BytesIO()
            Image.fromarray(draw_picture(picture)).save(file, "PNG")
            seen = see_medium("image", file.getvalue(), MediumSettings(), OPTIONS, source="")
            assert medium.grid_thw == seen.receipt.grid_thw
            assert np.array_equal(medium.patches, seen.patches)


def test_clips(tokenizer: ChatTokenizer) -> None:
    for index in range(5):
        made = example("describe_video", "held-out", 0, index)
        (medium,) = tokenize_example(made, tokenizer, vision_id=True).media
        (clip,) = made.media
        assert not isinstance(clip, Picture)
        data = encode_clip(draw_clip(clip), clip.fps)
        seen = see_medium("video", data, MediumSettings(), OPTIONS, source="")
        assert medium.grid_thw == seen.receipt.grid_thw
        assert np.array_equal(medium.patches, seen.patches)


def test_sizes_are_many_and_within_bounds() -> None:
    examples = [example("image_and_video", "held-out", 0, index) for index in range(60)]
    media = [medium for one in examples for medium in see_media(one.media, codec=False)]
    image_grids, video_grids = ({one.grid_thw for one in media if one.kind == kind} for kind in ("image", "video"))
    assert len(image_grids) >= 6 and len(video_grids) >= 4
    for _, height, width in image_grids:
        assert recipe.IMAGE_MIN_PIXELS <= height * width * 196 <= recipe.IMAGE_MAX_PIXELS
    # No more steps in time than places along the longer side: there the two rules for positions agree.
    assert all(t <= max(height, width) // 2 for t, height, width in video_grids)
