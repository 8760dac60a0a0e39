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
from pipeline.demo.training.samples import Sample, make_sample
from pipeline.demo.training.tokens import write_tokenizer
from pipeline.preprocess.decode import see_medium
from pipeline.preprocess.prompt import ChatTokenizer
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
        sample = make_sample(made, tokenizer, vision_id=True)
        seen = []
        for picture in made.media:
            assert isinstance(picture, Picture)
            file = io.BytesIO()
            Image.fromarray(draw_picture(picture)).save(file, "PNG")
            seen.append(see_medium("image", file.getvalue(), MediumSettings(), OPTIONS, source=""))
        assert sample.image_grids == tuple(medium.receipt.grid_thw for medium in seen)
        halves = sample.image_patches.reshape(-1, 3, 2, 196)
        assert np.array_equal(halves[:, :, 0], halves[:, :, 1])
        assert np.array_equal(
            halves[:, :, 0].reshape(-1, 588), np.concatenate([np.asarray(medium.patches) for medium in seen])
        )


def test_clips(tokenizer: ChatTokenizer) -> None:
    for index in range(5):
        made = example("describe_video", "held-out", 0, index)
        sample = make_sample(made, tokenizer, vision_id=True)
        (clip,) = made.media
        assert not isinstance(clip, Picture)
        data = encode_clip(draw_clip(clip), clip.fps)
        seen = see_medium("video", data, MediumSettings(), OPTIONS, source="")
        assert sample.video_grids == (seen.receipt.grid_thw,)
        assert np.array_equal(sample.video_patches, seen.patches)


def test_sizes_are_many_and_within_bounds(tokenizer: ChatTokenizer) -> None:
    samples = [_sample("image_and_video", index, tokenizer) for index in range(60)]
    image_grids = {grid for sample in samples for grid in sample.image_grids}
    video_grids = {grid for sample in samples for grid in sample.video_grids}
    assert len(image_grids) >= 6 and len(video_grids) >= 4
    for _, height, width in image_grids:
        assert recipe.IMAGE_MIN_PIXELS <= height * width * 196 <= recipe.IMAGE_MAX_PIXELS
    # No more steps in time than places along the longer side: there the two rules for positions agree.
    assert all(t <= max(height, width) // 2 for t, height, width in video_grids)


def _sample(task: str, index: int, tokenizer: ChatTokenizer) -> Sample:
    return make_sample(example(task, "held-out", 0, index), tokenizer, vision_id=True, codec=False)
