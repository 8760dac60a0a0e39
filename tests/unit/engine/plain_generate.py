"""Rows, and what transformers alone makes of each: its own positions, pixels, attention, loop and end tokens.

Two worlds: a tiny model of random weights, shown noise; and the demo checkpoint, shown its own scenes. Only rows whose
every token is decided clearly: at a near-tie, sums in another order may rightly choose otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipeline.conversation import MediumPart, Message, Text
from pipeline.demo import CHECKPOINT
from pipeline.demo.clips import sampled_frames
from pipeline.demo.scenes import Clip, Picture, draw_clip, draw_picture, random_clip, random_names, random_picture
from pipeline.demo.tasks import TASKS, example
from pipeline.demo.training import recipe
from pipeline.engine import Medium, Request, SamplingParams
from pipeline.engine.models.mrope import PLAIN_POSITIONS, PositionRule
from pipeline.engine.models.registry import ARCHITECTURES
from pipeline.preprocess.patches import patchify_image, patchify_video, resize_frames
from pipeline.preprocess.prompt import ChatTokenizer, MediumTokens
from pipeline.preprocess.size import grid_thw, smart_resize
from tests.unit.engine.tiny import ENDOFTEXT, IM_END, make_config, make_model, mixed_requests

SMALLEST_MARGIN = 2e-3
"""In logits, between the winner and the second: far more than float32 sums in another order move them."""

Floats = npt.NDArray[np.float32]
Pixels = Callable[[Medium], Floats]
"""transformers' pixel values [patches, 1176] of a medium."""


@dataclass(frozen=True, eq=False)
class World:
    model: Any
    """transformers' own, in float32."""
    requests: list[Request]
    expected: list[tuple[int, ...]]
    """Tokens of transformers' `generate` for each request alone."""
    odd_requests: list[Request]
    """Rows with a video of more steps than its frame has rows and columns: transformers numbers what follows it
    otherwise than the model was trained, and we don't."""
    image_processor: Literal["torch", "pil"]

    @property
    def cache_bytes(self) -> int:
        """Of one token's keys and values."""
        config = self.model.config.text_config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 4)


def plain_generate(model: Any, request: Request, pixels: Pixels) -> tuple[tuple[int, ...], float]:
    """The row's tokens as the model's page shows it, and the smallest margin by which one of them won."""
    config = model.config
    ids = torch.tensor(request.input_ids.astype(np.int64))[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for kind, values, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        mine = [medium for medium in request.media if medium.kind == kind]
        if mine:
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id)
            inputs[grid] = torch.tensor([medium.grid_thw for medium in mine])
            if kind == "video" and config.model_type == "qwen2_5_vl":
                inputs["second_per_grid_ts"] = torch.tensor([medium.seconds_per_step for medium in mine])
            inputs[values] = torch.from_numpy(np.concatenate([pixels(medium) for medium in mine]))
    with torch.inference_mode():
        out = model.generate(
            **inputs,
            max_new_tokens=request.sampling.max_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    first, second = torch.stack(out.logits).topk(2).values.unbind(-1)
    return tuple(out.sequences[0, ids.shape[1] :].tolist()), float((first - second).min())


def numbered_alike(request: Request, rule: PositionRule = PLAIN_POSITIONS) -> bool:
    """Whether transformers' positions are those the model was trained with."""
    return rule.separate_steps or all(
        rule.temporal(medium)[-1] < max(medium.grid_thw[1:]) // 2 for medium in request.media
    )


def clip_pixels(medium: Medium) -> Floats:
    """Pixel values by the formula of transformers' processors, with CLIP's mean and deviation."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = (np.asarray(each, dtype=np.float32)[:, None, None] for each in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    num_patches, halves = len(medium.patches), 1 if medium.kind == "image" else 2
    steps = medium.patches.reshape(num_patches, 3, halves, -1).astype(np.float32)
    both = np.broadcast_to((steps / 255 - mean) / std, (num_patches, 3, 2, steps.shape[-1]))
    return both.reshape(num_patches, -1)


def random_world(num_rows: int, family: str = "qwen2_vl", **changes: Any) -> World:
    """`changes` to the tiny config of the family."""
    config = make_config(family, **changes)
    rule = ARCHITECTURES[family].positions(config)
    candidates = mixed_requests(4 * num_rows, family=family)
    alike = [request for request in candidates if numbered_alike(request, rule)]
    odd = [request for request in candidates if not numbered_alike(request, rule)]
    model = make_model(config=config)
    model.generation_config.eos_token_id = [IM_END, ENDOFTEXT]
    model.generation_config.pad_token_id = ENDOFTEXT
    return _world(model, alike, clip_pixels, odd, num_rows, "torch")


def demo_world(num_rows: int) -> World:
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    scenes = Scenes()
    requests = list(scenes.rows(num_rows + num_rows // 4))
    assert all(map(numbered_alike, requests))
    return _world(model, requests, scenes.pixels, [], num_rows, "pil")


def _world(
    model: Any, requests: list[Request], pixels: Pixels, odd: list[Request], num_rows: int, processor: Any
) -> World:
    answers = ((request, *plain_generate(model, request, pixels)) for request in requests)
    clear = ((request, tokens) for request, tokens, margin in answers if margin > SMALLEST_MARGIN)
    rows = list(islice(clear, num_rows))
    assert len(rows) == num_rows, f"{len(rows)} rows of {len(requests)} are clear; draw more"
    return World(model, [request for request, _ in rows], [tokens for _, tokens in rows], odd, processor)


class Scenes:
    """Rows of the drawn world: questions about none to five pictures and clips, some of them shared."""

    def __init__(self) -> None:
        from transformers import Qwen2VLImageProcessorPil

        self._processor = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)
        self._tokenizer = ChatTokenizer(str(CHECKPOINT))
        self._pixels: dict[int, Floats] = {}
        self._seen: list[Medium] = []

    def pixels(self, medium: Medium) -> Floats:
        """What transformers' image processor made of the picture, or of each frame of the clip."""
        return self._pixels[id(medium)]

    def rows(self, count: int) -> Iterator[Request]:
        rng = random.Random(12)
        for request_id in range(count):
            if rng.random() < 0.4:
                made = example(rng.choice(list(TASKS)), "held-out", 3, request_id)
                media, question = [self._see(scene) for scene in made.media], made.question
            else:
                media = [self._random_medium(rng) for _ in range(rng.choice([1, 2, 3, 4, 5]))]
                question = example(rng.choice(list(TASKS)), "held-out", 4, request_id).question
            parts = (*(MediumPart(medium.kind, b"") for medium in media), Text(question))
            prompt = self._tokenizer.render([Message("user", parts)], add_vision_id=True)
            ids = self._tokenizer.expand(prompt, [MediumTokens(one.kind, one.num_visual_tokens) for one in media])
            yield Request(request_id, ids, tuple(media), SamplingParams(max_tokens=rng.randint(1, 30)))

    def _random_medium(self, rng: random.Random) -> Medium:
        if self._seen and rng.random() < 0.15:
            return rng.choice(self._seen)
        names = random_names(rng, rng.randint(1, 2))
        return self._see(random_picture(rng, names) if rng.random() < 0.6 else random_clip(rng, names))

    def _see(self, scene: Picture | Clip) -> Medium:
        medium = self._see_picture(scene) if isinstance(scene, Picture) else self._see_clip(scene)
        self._seen.append(medium)
        return medium

    def _see_picture(self, picture: Picture) -> Medium:
        frame = draw_picture(picture)
        limits = (recipe.IMAGE_MIN_PIXELS, recipe.IMAGE_MAX_PIXELS)
        height, width = smart_resize(*frame.shape[:2], factor=28, min_pixels=limits[0], max_pixels=limits[1])
        patches = patchify_image(resize_frames(frame[None], height, width, resize="pil")[0], patch_size=14)
        medium = Medium("image", grid_thw(1, height, width, patch_size=14), patches)
        self._pixels[id(medium)] = self._process(frame, medium, limits)
        return medium

    def _see_clip(self, clip: Clip) -> Medium:
        chosen = sampled_frames(
            clip.num_frames, clip.fps, sample_fps=recipe.VIDEO_FPS, min_frames=recipe.VIDEO_MIN_FRAMES
        )
        frames = draw_clip(clip, chosen)
        limits = (recipe.VIDEO_MIN_PIXELS, recipe.VIDEO_MAX_PIXELS)
        height, width = smart_resize(*frames.shape[1:3], factor=28, min_pixels=limits[0], max_pixels=limits[1])
        patches = patchify_video(resize_frames(frames, height, width, resize="pil"), patch_size=14)
        medium = Medium("video", grid_thw(len(frames), height, width, patch_size=14), patches)
        # A still is a frame twice, so two stills give the two halves of a step.
        halves = [self._process(frame, medium, limits).reshape(-1, 3, 2, 196)[:, :, 0] for frame in frames]
        steps = [np.stack(pair, axis=2) for pair in zip(halves[::2], halves[1::2], strict=True)]
        self._pixels[id(medium)] = np.concatenate(steps).reshape(len(patches), 1176)
        return medium

    def _process(self, frame: npt.NDArray[np.uint8], medium: Medium, limits: tuple[int, int]) -> Floats:
        size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
        out = self._processor(Image.fromarray(frame), size=size, return_tensors="np")
        assert tuple(out["image_grid_thw"][0][1:]) == medium.grid_thw[1:]
        values: Floats = out["pixel_values"]
        return values
