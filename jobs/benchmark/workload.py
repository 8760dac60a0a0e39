"""The engine benchmark's workload: seeded rows, and the least time that they can take.

    rows        images of random patches, clips, text, or all of them mixed; output lengths are fixed for each row
    ceilings    what a large matrix product and a large copy reach on this device, measured where the engine runs
    bound       arithmetic and memory traffic of the rows at these ceilings, for each kind of pass

Knows the model's arithmetic; not how an engine is run or timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from jobs.benchmark.model import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from pipeline.checkpoint.families import DEFAULT_FAMILY
from pipeline.checkpoint.families.family import Family
from pipeline.engine import Medium, Request, SamplingParams
from pipeline.planning.roofline import ModelShape, RowWork, decode_bytes, row_flops
from pipeline.preprocess.size import smart_resize

Rows = Literal["image", "video", "text", "mixed"]
ROWS: tuple[Rows, ...] = get_args(Rows)
MAX_CLIP_TOKENS = 24_000
"""Visual tokens of a clip at most, so that it fits the context."""
TIME_TOKENS = 7
"""What a time before a step of a video takes: `<12.5 seconds>`."""


def make_requests(num_rows: int, **settings: Any) -> list[Request]:
    """The first rows of a seeded workload: see `draw_requests`."""
    return list(islice(draw_requests(**settings), num_rows))


def draw_requests(
    *,
    family: Family = DEFAULT_FAMILY,
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
        media = [_medium(rng, family, kind, side, longest, max_pixels or 12_845_056) for _ in range(num_media)]
        text = rng.integers(8, 4000, int(rng.integers(100, 2001)) if kind == "text" else 25)
        ids = [*text[:12]]
        for medium in media:
            if medium.kind == "video" and family.video_prompt == "timed steps":
                steps = medium.grid_thw[0]
                run = [VISION_START, *([VIDEO_PAD] * (medium.num_visual_tokens // steps)), VISION_END]
                for _ in range(steps):
                    ids += [*rng.integers(8, 4000, TIME_TOKENS), *run]
                continue
            pad = IMAGE_PAD if medium.kind == "image" else VIDEO_PAD
            ids += [VISION_START, *([pad] * medium.num_visual_tokens), VISION_END]
        ids += [*text[12:]]
        most = 256 if rows == "mixed" else 128
        sampling = SamplingParams(max_tokens=tokens or int(rng.integers(16, most + 1)), ignore_eos=True)
        yield Request(number, np.asarray(ids, dtype=np.int32), tuple(media), sampling)
        number += 1


def _medium(
    rng: np.random.Generator, family: Family, kind: str, side: int | None, longest: int, max_pixels: int
) -> Medium:
    height, width = (side, side) if side else (int(x) for x in rng.integers(240, longest + 1, 2))
    steps, factor = 1, family.factor
    if kind == "video":
        steps = int(rng.integers(10, 61))  # two frames make a step
        max_pixels = min(max_pixels, MAX_CLIP_TOKENS // steps * factor**2)
    height, width = smart_resize(height, width, factor=factor, min_pixels=4 * factor**2, max_pixels=max_pixels)
    grid = (steps, height // family.patch_size, width // family.patch_size)
    name: Literal["image", "video"] = "video" if kind == "video" else "image"
    patches = rng.integers(0, 256, (math.prod(grid), family.patch_bytes(name)), dtype=np.uint8)
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


def best_seconds(function: Callable[[], object], device: torch.device) -> float:
    """The shortest of twelve calls; on a GPU each is waited for."""
    best = float("inf")
    for _ in range(12):
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
