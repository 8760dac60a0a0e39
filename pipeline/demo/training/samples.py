"""One question as the model's input, through the pipeline's own preprocessing.

Knows scenes, patches and tokens; not training or evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.families.qwen2_vl import QWEN2_VL
from pipeline.conversation import MediumKind, MediumPart, Message, Text
from pipeline.demo.clips import decode_clip, encode_clip, halve_chroma, sampled_frames
from pipeline.demo.scenes import Clip, Picture, draw_clip, draw_picture
from pipeline.demo.tasks import Example, Scene
from pipeline.demo.training import recipe
from pipeline.engine import Medium, Request
from pipeline.engine.models.mrope import lay_out_prompt
from pipeline.preprocess.patches import patchify_image, patchify_video, resize_frames
from pipeline.preprocess.prompt import ChatTokenizer, MediumTokens
from pipeline.preprocess.size import grid_thw, smart_resize


@dataclass(frozen=True)
class TokenizedExample:
    """One question with its answer, tokenized, and its media as patches."""

    media: tuple[Medium, ...]
    input_ids: npt.NDArray[np.int32]
    """[P + A]: the prompt, then the answer with its end token."""
    positions: npt.NDArray[np.int32]
    """[3, P + A]: time, height, width."""
    num_answer_tokens: int

    @property
    def prompt_ids(self) -> npt.NDArray[np.int32]:
        return self.input_ids[: -self.num_answer_tokens]

    @property
    def answer_ids(self) -> npt.NDArray[np.int32]:
        return self.input_ids[-self.num_answer_tokens :]


def tokenize_example(
    example: Example, tokenizer: ChatTokenizer, *, vision_id: bool, media: tuple[Medium, ...] | None = None
) -> TokenizedExample:
    """Tokenize an example; `media` are its scenes as `see_media` gives them, where they are known already."""
    media = see_media(example.media) if media is None else media
    kinds, sizes = zip(*((one.kind, one.num_visual_tokens) for one in media), strict=True) if media else ((), ())
    prompt_ids = _prompt_ids(tokenizer, kinds, example.question, vision_id, sizes)
    answer_ids = tokenizer.encode(example.answer + "<|im_end|>")
    input_ids = np.concatenate([prompt_ids, answer_ids])
    layout = lay_out_prompt(
        Request(0, input_ids, media), image_token_id=tokenizer.image_pad_id, video_token_id=tokenizer.video_pad_id
    )
    return TokenizedExample(media, input_ids, layout.positions, len(answer_ids))


def see_media(scenes: Sequence[Scene], *, codec: bool = True) -> tuple[Medium, ...]:
    """Draw scenes, encode and decode clips, resize and patchify.

    `codec=False` replaces H.264 by its colour conversion alone: nearly the same pixels, for a tenth of the time.
    """
    return tuple(_see_picture(one) if isinstance(one, Picture) else _see_clip(one, codec=codec) for one in scenes)


def _see_picture(picture: Picture) -> Medium:
    limits = {"min_pixels": recipe.IMAGE_MIN_PIXELS, "max_pixels": recipe.IMAGE_MAX_PIXELS}
    height, width = smart_resize(picture.height, picture.width, factor=QWEN2_VL.factor, **limits)
    pixels = resize_frames(draw_picture(picture)[None], height, width)[0]
    patches = patchify_image(pixels, patch_size=QWEN2_VL.patch_size)
    return Medium("image", grid_thw(1, height, width, patch_size=QWEN2_VL.patch_size), patches)


def _see_clip(clip: Clip, *, codec: bool) -> Medium:
    chosen = sampled_frames(clip.num_frames, clip.fps, sample_fps=recipe.VIDEO_FPS, min_frames=recipe.VIDEO_MIN_FRAMES)
    if codec:
        frames = decode_clip(encode_clip(draw_clip(clip), clip.fps), chosen)
    else:
        frames = halve_chroma(draw_clip(clip, chosen))
    limits = {"min_pixels": recipe.VIDEO_MIN_PIXELS, "max_pixels": recipe.VIDEO_MAX_PIXELS}
    height, width = smart_resize(clip.height, clip.width, factor=QWEN2_VL.factor, **limits)
    patches = patchify_video(resize_frames(frames, height, width), patch_size=QWEN2_VL.patch_size)
    return Medium("video", grid_thw(len(frames), height, width, patch_size=QWEN2_VL.patch_size), patches)


@lru_cache(maxsize=20_000)
def _prompt_ids(
    tokenizer: ChatTokenizer, kinds: tuple[MediumKind, ...], question: str, vision_id: bool, sizes: tuple[int, ...]
) -> npt.NDArray[np.int32]:
    message = Message("user", (*(MediumPart(kind, b"") for kind in kinds), Text(question)))
    media = list(map(MediumTokens, kinds, sizes))
    return tokenizer.expand(tokenizer.render([message], add_vision_id=vision_id), media)
