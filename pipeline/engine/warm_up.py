"""What an engine on a GPU does before its first row: load the kernels, and capture graphs for some seconds.

The largest batch is captured first: most passes of a job have that size, and the smaller graphs reuse its memory. Sizes
for which there is no time are captured when a batch first needs them. Capture itself is injected by the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np

from pipeline.engine.sequence import MERGE_SIZE, PATCH_BYTES, Medium, Request
from pipeline.engine.settings import SamplingParams

MAX_SECONDS = 10.0
"""For captures; one that is running is finished."""

MAX_VISUAL_TOKENS = 256


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


def first_request(image_token_id: int, *, max_length: int) -> Request:
    """One black image and two tokens of answer, `max_length` tokens at most in all. It needs vision, prefill and
    decode."""
    num_visual = max(1, min(MAX_VISUAL_TOKENS, max_length - 3))
    grid_thw = (1, MERGE_SIZE, MERGE_SIZE * num_visual)
    medium = Medium("image", grid_thw, np.zeros((MERGE_SIZE**2 * num_visual, PATCH_BYTES["image"]), dtype=np.uint8))
    ids = np.asarray([*[image_token_id] * num_visual, 0], dtype=np.int32)
    return Request("warm-up", ids, (medium,), SamplingParams(max_tokens=2, seed=0, ignore_eos=True))
