"""What an engine on a GPU does before its first row: answer requests that try its parts, and capture graphs.

The largest batch is captured first: most passes of a job have that size, and the smaller graphs reuse its memory. Sizes
for which there is no time are captured when a batch first needs them. Capture itself is injected by the caller.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import numpy as np

from pipeline.engine.sequence import MERGE_SIZE, Medium, Request, patch_bytes
from pipeline.engine.settings import SamplingParams

MAX_SECONDS = 10.0
"""For captures; one that is running is finished."""

MAX_VISUAL_TOKENS = 256
LARGE_IMAGE_TOKENS = 1297
"""Of a request with an image of 1008x1008: 36 x 36 visual tokens and one of text."""


def capture_largest_first(
    sizes: Iterable[int],
    capture: Callable[[int], None],
    *,
    max_seconds: float = MAX_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Capture one size after another while there is time for another capture as long as the last one."""
    started = before = clock()
    last = 0.0
    for size in sorted(sizes, reverse=True):
        if before - started + last > max_seconds:
            return
        capture(size)
        now = clock()
        before, last = now, now - before


def first_request(image_token_id: int, patch_size: int, *, max_length: int) -> Request:
    """One black image and two tokens of answer, `max_length` tokens at most in all. It needs vision, prefill and
    decode."""
    num_visual = max(1, min(MAX_VISUAL_TOKENS, max_length - 3))
    return _request("warm-up", image_token_id, patch_size, num_visual, num_text=1, max_tokens=2)


def full_pass(
    image_token_id: int, patch_size: int, *, max_tokens: int, max_patches: int, max_length: int
) -> list[Request]:
    """Requests that together fill one prefill pass and its vision pass, as images of about 1000x1000 do."""
    requests: list[Request] = []
    tokens, visual = max_tokens, max_patches // MERGE_SIZE**2
    while tokens > 0:
        length = min(tokens, LARGE_IMAGE_TOKENS, max_length - 1)
        num_visual = min(visual, length - 1)
        number, num_text = len(requests), length - num_visual
        requests.append(_request(number, image_token_id, patch_size, num_visual, num_text=num_text, max_tokens=1))
        tokens, visual = tokens - length, visual - num_visual
    return requests


def _request(
    request_id: int | str, image_token_id: int, patch_size: int, num_visual: int, *, num_text: int, max_tokens: int
) -> Request:
    """An image, where it has visual tokens, and text after it."""
    ids = np.asarray([*[image_token_id] * num_visual, *[0] * num_text], dtype=np.int32)
    sampling = SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True)
    if not num_visual:
        return Request(request_id, ids, (), sampling)
    # As square as the number allows: attention within one long frame would take far longer.
    height = max(side for side in range(1, math.isqrt(num_visual) + 1) if num_visual % side == 0)
    grid_thw = (1, MERGE_SIZE * height, MERGE_SIZE * (num_visual // height))
    patches = np.zeros((MERGE_SIZE**2 * num_visual, patch_bytes("image", patch_size)), dtype=np.uint8)
    # The id as the image's first bytes: equal images would be encoded once.
    patches[0, :8] = np.frombuffer(hash(request_id).to_bytes(8, "little", signed=True), dtype=np.uint8)
    return Request(request_id, ids, (Medium("image", grid_thw, patches),), sampling)
