"""Three-axis positions (M-RoPE), by the rule the model was trained with. Numpy only.

    text      v v v v v v   text          a medium of 1 x 2 x 3 visual tokens after two text tokens
    t  0 1    2 2 2 2 2 2    5 6
    h  0 1    2 2 2 3 3 3    5 6          text continues at (largest position so far) + 1
    w  0 1    2 3 4 2 3 4    5 6

transformers 5.23 continues at start + max(h, w) instead. The two differ where a video has more temporal steps than
that: its later text then gets positions before the end of the video. So both engines use these positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.engine.sequence import MERGE_SIZE, Medium, PromptLayout, Request, VisualRun
from pipeline.errors import GenerateError


@dataclass(frozen=True)
class PositionRule:
    """How a model family counts the temporal steps of a video."""

    separate_steps: bool = False
    """Each step stands in the prompt by itself, with text before it, and is numbered as an image is."""
    tokens_per_second: float | None = None
    """Positions that a second of video takes; None: a step takes one, however long it is."""

    def temporal(self, medium: Medium) -> npt.NDArray[np.int32]:
        """Position of each temporal step, counted from the first."""
        steps: npt.NDArray[Any] = np.arange(medium.grid_thw[0])
        if self.tokens_per_second is not None and medium.kind == "video":
            # In float32, as transformers computes it: a product that should be whole falls on the same side.
            interval = np.float32(self.tokens_per_second) * np.float32(medium.seconds_per_step)
            steps = steps.astype(np.float32) * interval
        return steps.astype(np.int32)


PLAIN_POSITIONS = PositionRule()


def lay_out_prompt(
    request: Request, *, image_token_id: int, video_token_id: int, rule: PositionRule = PLAIN_POSITIONS
) -> PromptLayout:
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
    runs: list[VisualRun] = []
    cursor = next_position = num_seen = 0
    for number, medium in enumerate(request.media):
        wanted = image_token_id if medium.kind == "image" else video_token_id
        for first, coordinates in _runs(medium, rule):
            start = int(visual_indices[num_seen])
            stop = start + coordinates.shape[1]
            if not bool((ids[start:stop] == wanted).all()):
                raise GenerateError(
                    f"the {medium.kind} with grid {medium.grid_thw} needs {coordinates.shape[1]} of its "
                    f"placeholders in a row from token {start}; they are interrupted or of the other kind"
                )
            positions[:, cursor:start] = next_position + np.arange(start - cursor)
            next_position += start - cursor
            positions[:, start:stop] = next_position + coordinates
            next_position += int(coordinates[:, -1].max()) + 1
            runs.append(VisualRun(number, first, start, stop))
            num_seen += stop - start
            cursor = stop
    positions[:, cursor:] = next_position + np.arange(len(ids) - cursor)
    next_position += len(ids) - cursor
    return PromptLayout(positions, next_position - len(ids), tuple(runs))


def _runs(medium: Medium, rule: PositionRule) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
    """(visual tokens before it, positions [3, tokens] from 0) of each run of the medium's tokens in the prompt."""
    t, h, w = medium.grid_thw[0], medium.grid_thw[1] // MERGE_SIZE, medium.grid_thw[2] // MERGE_SIZE
    if rule.separate_steps:
        coordinates = np.indices((1, h, w), dtype=np.int32).reshape(3, -1)
        yield from ((step * h * w, coordinates) for step in range(t))
        return
    coordinates = np.indices((t, h, w), dtype=np.int32)
    coordinates[0] = rule.temporal(medium)[:, None, None]
    yield 0, coordinates.reshape(3, -1)
