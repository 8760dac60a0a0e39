"""The engine benchmark's workload: models of random weights, seeded rows, and the least time that they can take.

    rows        images of random patches, clips, text, or all of them mixed; output lengths are fixed for each row
    ceilings    what a large matrix product and a large copy reach on this device, measured where the engine runs
    bound       arithmetic and memory traffic of the rows at these ceilings, for each kind of pass

Knows the model's arithmetic; not how an engine is run or timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from pipeline.engine import Medium, Request, SamplingParams
from pipeline.engine.sequence import patch_bytes
from pipeline.planning.roofline import SHAPES as PUBLISHED
from pipeline.planning.roofline import ModelShape, RowWork, decode_bytes, row_flops
from pipeline.preprocess.size import smart_resize

IMAGE_PAD, VISION_START, VISION_END, VIDEO_PAD = 4, 5, 6, 7

# A Qwen2-VL for dry runs and one that a CPU runs in seconds, beside those of the published checkpoints.
SHAPES = {
    "tiny": ModelShape(64, 2, 4, 2, 96, 4096, True, 32, 1, 2),
    "small": ModelShape(768, 12, 12, 2, 3072, 4096, True, 512, 8, 8),
    **{name: PUBLISHED[name] for name in ("2b", "7b", "72b")},  # `make_model` makes Qwen2-VL
}

Rows = Literal["image", "video", "text", "mixed"]
ROWS: tuple[Rows, ...] = get_args(Rows)
MAX_CLIP_TOKENS = 24_000
"""Visual tokens of a clip at most, so that it fits the context."""


def make_model(shape: ModelShape, device: str, dtype: torch.dtype) -> Any:
    """transformers' model with random weights, made on the device."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    third = shape.head_dim // 8
    sections = [shape.head_dim // 2 - 6 * third // 2, 3 * third // 2, 3 * third // 2]
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "depth": shape.vision_layers,
            "embed_dim": shape.vision_width,
            "num_heads": shape.vision_heads,
            "hidden_size": shape.hidden,
        },
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen2VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)


def make_requests(num_rows: int, **settings: Any) -> list[Request]:
    """The first rows of a seeded workload: see `draw_requests`."""
    return list(islice(draw_requests(**settings), num_rows))


def draw_requests(
    *,
    rows: Rows = "image",
    side: int | None = None,
    tokens: int | None = None,
    max_pixels: int | None = None,
    seed: int = 0,
) -> Iterator[Request]:
    """One row after another, without end.

    image   one image of 240 to 640 pixels a side, 16 to 128 output tokens
    video   one clip of 10 to 60 s at two frames a second, its frames of the same sizes
    text    100 to 2,000 words
    mixed   one to five images of 240 to 1,600 pixels, a clip or text, 16 to 256 output tokens

    `side` and `tokens` replace the sides and the output tokens, `max_pixels` bounds an image or a frame.
    """
    rng = np.random.default_rng(seed)
    number = 0
    while True:
        kind = str(rng.choice(["image", "video", "text"], p=[0.6, 0.25, 0.15])) if rows == "mixed" else rows
        num_media = 0 if kind == "text" else int(rng.integers(1, 6)) if (rows, kind) == ("mixed", "image") else 1
        longest = 1600 if (rows, kind) == ("mixed", "image") else 640
        media = [_medium(rng, kind, side, longest, max_pixels or 12_845_056) for _ in range(num_media)]
        text = rng.integers(8, 4000, int(rng.integers(100, 2001)) if kind == "text" else 25)
        ids = [*text[:12]]
        for medium in media:
            pad = IMAGE_PAD if medium.kind == "image" else VIDEO_PAD
            ids += [VISION_START, *([pad] * medium.num_visual_tokens), VISION_END]
        ids += [*text[12:]]
        most = 256 if rows == "mixed" else 128
        sampling = SamplingParams(max_tokens=tokens or int(rng.integers(16, most + 1)), ignore_eos=True)
        yield Request(number, np.asarray(ids, dtype=np.int32), tuple(media), sampling)
        number += 1


def _medium(rng: np.random.Generator, kind: str, side: int | None, longest: int, max_pixels: int) -> Medium:
    height, width = (side, side) if side else (int(x) for x in rng.integers(240, longest + 1, 2))
    steps = 1
    if kind == "video":
        steps = int(rng.integers(10, 61))  # two frames make a step
        max_pixels = min(max_pixels, MAX_CLIP_TOKENS // steps * 28 * 28)
    height, width = smart_resize(height, width, factor=28, min_pixels=56 * 56, max_pixels=max_pixels)
    grid = (steps, height // 14, width // 14)
    name: Literal["image", "video"] = "video" if kind == "video" else "image"
    patches = rng.integers(0, 256, (grid[0] * grid[1] * grid[2], patch_bytes(name, 14)), dtype=np.uint8)
    return Medium(name, grid, patches)


class Ceilings(NamedTuple):
    """What this device reaches; a data sheet's figures are some 20 % higher."""

    flops: float
    """FLOP/s of a large matrix product."""
    bytes_per_s: float
    """Bytes read and written by a large copy."""


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A matrix product in the kernel that the engine would use, and a copy."""
    from pipeline.engine.dense import needs_float32_matmul

    on_gpu = device.type == "cuda"
    wide = torch.float32 if needs_float32_matmul(device, dtype) else dtype
    rows, width, num_bytes = (8192, 8192, 2**31) if on_gpu else (2048, 1024, 2**26)
    a, b = torch.randn(rows, width, device=device, dtype=wide), torch.randn(width, width, device=device, dtype=wide)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = best_seconds(lambda: torch.nn.functional.linear(a, b), device)
    copy = best_seconds(lambda: target.copy_(source), device)
    return Ceilings(2 * rows * width * width / product, 2 * num_bytes / copy)


def best_seconds(function: Callable[[], object], device: torch.device, *, repeats: int = 12) -> float:
    """The shortest of some calls; on a GPU each is waited for."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def row_work(request: Request) -> RowWork:
    grids = [medium.grid_thw for medium in request.media]
    return RowWork(grids, len(request.input_ids), request.sampling.max_tokens)


def total_flops(shape: ModelShape, requests: Sequence[Request]) -> float:
    return sum(sum(row_flops(shape, row_work(request))) for request in requests)


def bound_seconds(
    shape: ModelShape, requests: Sequence[Request], ceilings: Ceilings, *, running: int, on_gpu: bool
) -> dict[str, float]:
    """The least time of each kind of pass: its arithmetic, and for decoding on a GPU its memory traffic, where that
    takes longer."""
    works = [row_work(request) for request in requests]
    vision, prefill, decode = (sum(part) for part in zip(*(row_flops(shape, work) for work in works), strict=True))
    together = min(running, len(works))
    traffic = sum(decode_bytes(shape, work.prompt_tokens, work.output_tokens, together) for work in works)
    slowest = max(decode / ceilings.flops, traffic / ceilings.bytes_per_s if on_gpu else 0.0)
    return {"vision": vision / ceilings.flops, "prefill": prefill / ceilings.flops, "decode": slowest}
