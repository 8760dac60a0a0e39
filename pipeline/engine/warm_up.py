"""What an engine on a GPU does before its first row: load the kernels, and capture graphs for seconds, not minutes.

The largest batch comes first: most passes of a job are that large, and the memory its graph takes serves the smaller
ones too. Sizes that the seconds don't reach are captured when a batch first needs them.
Knows sizes and seconds; how a graph is captured it is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np

from pipeline.engine.sequence import PATCH_BYTES, Medium, Request
from pipeline.engine.settings import SamplingParams

MAX_SECONDS = 10.0
"""For capturing; a capture under way is finished."""

MAX_VISUAL_TOKENS = 256


def capture_largest_first(
    sizes: Iterable[int],
    capture: Callable[[int], None],
    *,
    max_seconds: float = MAX_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Capture one size after another while there are seconds left for one more like the one before."""
    started = before = clock()
    last = 0.0
    for size in sorted(sizes, reverse=True):
        if before - started + last > max_seconds:
            return
        capture(size)
        now = clock()
        before, last = now, now - before


def first_request(image_token_id: int, *, room: int) -> Request:
    """One black image and two tokens of answer, within `room` tokens of prompt and answer: it goes through vision,
    prefill and decode."""
    num_visual = max(1, min(MAX_VISUAL_TOKENS, room - 3))
    patches = np.zeros((4 * num_visual, PATCH_BYTES["image"]), dtype=np.uint8)
    medium = Medium("image", (1, 2, 2 * num_visual), patches)
    ids = np.asarray([*[image_token_id] * num_visual, 0], dtype=np.int32)
    return Request("warm-up", ids, (medium,), SamplingParams(max_tokens=2, seed=0, ignore_eos=True))
