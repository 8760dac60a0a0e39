"""Three-axis positions (M-RoPE), by the rule the model was trained with. Numpy only.

    text      v v v v v v   text          a medium of 1 x 2 x 3 visual tokens after two text tokens
    t  0 1    2 2 2 2 2 2    5 6
    h  0 1    2 2 2 3 3 3    5 6          text continues at (largest position so far) + 1
    w  0 1    2 3 4 2 3 4    5 6

transformers 5.23 continues at start + max(h, w) instead. The two differ where a video has more temporal steps than
that: its later text then gets positions before the end of the video. So both engines use these positions.
"""

from __future__ import annotations

import numpy as np

from pipeline.engine.sequence import MERGE_SIZE, PromptLayout, Request
from pipeline.errors import GenerateError


def lay_out_prompt(request: Request, *, image_token_id: int, video_token_id: int) -> PromptLayout:
    """Find the media among the placeholders, and the position of every token.

    Raises GenerateError where placeholders and media disagree.
    """
    ids = np.asarray(request.input_ids)
    is_visual = (ids == image_token_id) | (ids == video_token_id)
    if int(is_visual.sum()) != request.num_visual_tokens:
        raise GenerateError(
            f"the prompt has {int(is_visual.sum())} visual placeholders, its {len(request.media)} media need "
            f"{request.num_visual_tokens}; expand one placeholder for each visual token"
        )
    visual_indices = np.flatnonzero(is_visual)
    positions = np.empty((3, len(ids)), dtype=np.int32)
    spans: list[tuple[int, int]] = []
    cursor = next_position = num_seen = 0
    for medium in request.media:
        start = int(visual_indices[num_seen])
        stop = start + medium.num_visual_tokens
        wanted = image_token_id if medium.kind == "image" else video_token_id
        if not bool((ids[start:stop] == wanted).all()):
            raise GenerateError(
                f"the {medium.kind} with grid {medium.grid_thw} needs {medium.num_visual_tokens} of its "
                f"placeholders in a row from token {start}; they are interrupted or of the other kind"
            )
        positions[:, cursor:start] = next_position + np.arange(start - cursor)
        next_position += start - cursor
        t, h, w = medium.grid_thw[0], medium.grid_thw[1] // MERGE_SIZE, medium.grid_thw[2] // MERGE_SIZE
        positions[:, start:stop] = next_position + np.indices((t, h, w), dtype=np.int32).reshape(3, -1)
        next_position += max(t, h, w)
        spans.append((start, stop))
        num_seen += medium.num_visual_tokens
        cursor = stop
    positions[:, cursor:] = next_position + np.arange(len(ids) - cursor)
    next_position += len(ids) - cursor
    return PromptLayout(positions, next_position - len(ids), tuple(spans))
