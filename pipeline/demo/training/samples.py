"""One question as the model's input, through the pipeline's own preprocessing.

Knows scenes, patches and tokens; not training or evaluation. Positions follow the rule by which the family was
trained: text after a medium starts one after the largest position so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.processor import MERGE_SIZE, PATCH_BYTES
from pipeline.conversation import MediumKind, MediumPart, Message, Text
from pipeline.demo.clips import decode_clip, encode_clip, halve_chroma, sampled_frames
from pipeline.demo.scenes import Clip, Picture, draw_clip, draw_picture
from pipeline.demo.tasks import Example
from pipeline.demo.training import recipe
from pipeline.engine.pixels import pixel_table
from pipeline.preprocess.patches import Uint8Array, patchify_image, patchify_video, resize_frames
from pipeline.preprocess.prompt import TURN_END, ChatTokenizer
from pipeline.preprocess.size import grid_thw, num_visual_tokens, smart_resize

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Sample:
    """One question, tokenized, with its media as patches."""

    task: str
    answer: str
    prompt_ids: npt.NDArray[np.int32]
    """[P]"""
    answer_ids: npt.NDArray[np.int32]
    """[A], the end token included."""
    positions: npt.NDArray[np.int64]
    """[3, P + A]: time, height, width."""
    image_patches: Uint8Array
    """[N, 1176]"""
    image_grids: tuple[Grid, ...]
    video_patches: Uint8Array
    """[M, 1176]"""
    video_grids: tuple[Grid, ...]


def make_sample(made: Example, tokenizer: ChatTokenizer, *, vision_id: bool, codec: bool = True) -> Sample:
    """Draw, encode, decode, resize, patchify and tokenize one example.

    `codec=False` replaces H.264 by its colour conversion alone: nearly the same pixels, for a tenth of the time.
    """
    return make_samples([made], tokenizer, vision_id=vision_id, codec=codec)[0]


def make_samples(
    examples: Sequence[Example], tokenizer: ChatTokenizer, *, vision_id: bool, codec: bool = True
) -> list[Sample]:
    """The samples of examples about the same media, which are drawn once."""
    media = examples[0].media
    assert all(made.media is media for made in examples)
    image_patches, video_patches, image_grids, video_grids, grids = [], [], [], [], []
    for scene in media:
        if isinstance(scene, Picture):
            patches, grid = _see_picture(scene)
            image_patches.append(patches)
            image_grids.append(grid)
        else:
            patches, grid = _see_clip(scene, codec=codec)
            video_patches.append(patches)
            video_grids.append(grid)
        grids.append(grid)
    nothing = np.empty((0, PATCH_BYTES["video"]), np.uint8)
    samples = []
    for made in examples:
        kinds: tuple[MediumKind, ...] = tuple("image" if isinstance(scene, Picture) else "video" for scene in media)
        prompt_ids = _prompt_ids(tokenizer, kinds, made.question, vision_id, tuple(map(num_visual_tokens, grids)))
        answer_ids = tokenizer.encode(made.answer + TURN_END, [])
        is_visual = (prompt_ids == tokenizer.image_pad_id) | (prompt_ids == tokenizer.video_pad_id)
        is_visual = np.concatenate([is_visual, np.zeros(len(answer_ids), dtype=bool)])
        samples.append(
            Sample(
                made.task,
                made.answer,
                prompt_ids,
                answer_ids,
                rotary_positions(is_visual, grids),
                np.concatenate([*image_patches, nothing]),
                tuple(image_grids),
                np.concatenate([*video_patches, nothing]),
                tuple(video_grids),
            )
        )
    return samples


def rotary_positions(is_visual: npt.NDArray[np.bool_], grids: Sequence[Grid]) -> npt.NDArray[np.int64]:
    """Time, height and width [3, L] of each token; `grids` are those of the media, in order."""
    positions = np.empty((3, len(is_visual)), dtype=np.int64)
    place, following = 0, 0
    for t, grid_h, grid_w in grids:
        first = place + int(np.argmax(is_visual[place:]))
        positions[:, place:first] = following + np.arange(first - place)
        following += first - place
        shape = (t, grid_h // MERGE_SIZE, grid_w // MERGE_SIZE)
        place = first + int(np.prod(shape))
        positions[:, first:place] = following + np.indices(shape).reshape(3, -1)
        following += max(shape)
    positions[:, place:] = following + np.arange(len(is_visual) - place)
    return positions


_TABLE = pixel_table()


def pixel_values(patches: Uint8Array) -> npt.NDArray[np.float32]:
    """Normalised values [N, 1176] of patches [N, 1176]."""
    channels = patches.reshape(len(patches), 3, -1)
    return np.stack([_TABLE[c][channels[:, c]] for c in range(3)], axis=1).reshape(len(patches), -1)


def _see_picture(picture: Picture) -> tuple[Uint8Array, Grid]:
    pixels = draw_picture(picture)
    height, width = smart_resize(
        picture.height, picture.width, min_pixels=recipe.IMAGE_MIN_PIXELS, max_pixels=recipe.IMAGE_MAX_PIXELS
    )
    patches = patchify_image(resize_frames(pixels[None], height, width)[0])
    # The model's own form: both temporal halves.
    doubled = np.repeat(patches.reshape(len(patches), 3, 1, -1), 2, axis=2).reshape(len(patches), -1)
    return doubled, grid_thw(1, height, width)


def _see_clip(clip: Clip, *, codec: bool) -> tuple[Uint8Array, Grid]:
    chosen = sampled_frames(clip.num_frames, clip.fps, sample_fps=recipe.VIDEO_FPS, min_frames=recipe.VIDEO_MIN_FRAMES)
    if codec:
        frames = decode_clip(encode_clip(draw_clip(clip), clip.fps), chosen)
    else:
        frames = halve_chroma(draw_clip(clip, chosen))
    height, width = smart_resize(
        clip.height, clip.width, min_pixels=recipe.VIDEO_MIN_PIXELS, max_pixels=recipe.VIDEO_MAX_PIXELS
    )
    return patchify_video(resize_frames(frames, height, width)), grid_thw(len(frames), height, width)


@lru_cache(maxsize=20_000)
def _prompt_ids(
    tokenizer: ChatTokenizer, kinds: tuple[MediumKind, ...], question: str, vision_id: bool, sizes: tuple[int, ...]
) -> npt.NDArray[np.int32]:
    message = Message("user", (*(MediumPart(kind, b"") for kind in kinds), Text(question)))
    return tokenizer.encode(tokenizer.render([message], add_vision_id=vision_id), sizes)
