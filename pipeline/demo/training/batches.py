"""Training batches: questions that share a beginning share its tokens, and are packed side by side into rows.

Knows samples and tensors; not the model's layers or the optimiser.

    row 0   [system prompt, picture][question a, answer a][question b, answer b][system prompt, clip][question c, ...]
            `- trunk of a group ---'`- branch ----------- '`- branch -----------'`- trunk of the next group

A token attends to the earlier ones of its own branch and to its group's trunk: what it sees, and where, is what it
would see alone. One picture thus teaches five questions for little more than the cost of one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipeline.demo import CHECKPOINT
from pipeline.demo.tasks import LESSONS, Example
from pipeline.demo.training.samples import TokenizedExample, see_media, tokenize_example
from pipeline.engine import EngineOptions, Medium
from pipeline.engine.pixels import PixelTable
from pipeline.preprocess.prompt import ChatTokenizer

_PICTURE = ("describe_image", "count", "count", "yes_no", "yes_no")
Mix: TypeAlias = Mapping[str, tuple[int, tuple[str, ...]]]
"""How many groups of questions a batch holds by the task whose scenes they are about, and what is asked of each."""

# At first, descriptions above all: every object's colour, shape and place in words is what teaches the model to see.
_SEEING: Mix = {
    "describe_image": (12, ("describe_image", "count", "yes_no")),
    "count": (2, _PICTURE),
    "describe_video": (2, ("describe_video",)),
    "text": (2, ("text",) * 2),
}
_ALL_TASKS: Mix = {
    "describe_image": (6, _PICTURE),
    "count": (6, _PICTURE),
    "describe_video": (8, ("describe_video",)),
    "compare": (6, ("compare",) * 3),
    "image_and_video": (6, ("image_and_video",)),
    "text": (4, ("text",) * 4),
}
# What is learned late gets more, what is learned early less.
_LATE_TASKS: Mix = {
    **_ALL_TASKS,
    "describe_video": (14, ("describe_video",)),
    "image_and_video": (3, ("image_and_video",)),
    "text": (6, ("text",) * 4),
}
_HARD_PARTS: Mix = {
    "describe_image": (6, ("describe_image", "count", "yes_no", "bound", "bound")),
    "bound": (2, ("bound",) * 4),
    "count": (6, _PICTURE),
    "describe_video": (12, ("describe_video",)),
    "compare": (6, ("compare",) * 3),
    "image_and_video": (2, ("image_and_video",)),
    "text": (2, ("text",) * 4),
    "order": (4, ("order",) * 6),
}
_HARDEST_PART: Mix = {
    **_HARD_PARTS,
    "describe_video": (2, ("describe_video",)),
    "move_and_stay": (14, ("describe_video",)),
    "bound": (1, ("bound",) * 4),
    "order": (2, ("order",) * 6),
}
_LAST_PARTS: Mix = {
    **_HARDEST_PART,
    "count": (3, _PICTURE),
    "count_three": (6, ("describe_image", "count", "count", "count", "bound", "bound")),
}
STAGES: Sequence[tuple[int, Mix]] = (
    (0, _SEEING),
    (400, _ALL_TASKS),
    (1200, _LATE_TASKS),
    (1600, _HARD_PARTS),
    (2200, _HARDEST_PART),
    (2400, _LAST_PARTS),
)
"""(step, batches from this step on)."""
# Real H.264 for one clip in eight; the others only lose colour as in H.264, or drawing would outlast training.
_CODEC_SHARE = 0.125
_ROW_LENGTH = 256
_TO_PIXELS = PixelTable(EngineOptions(str(CHECKPOINT)), device=torch.device("cpu"), dtype=torch.float32)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Samples about the same media, whose prompts have the same beginning: the trunk, with the media in it."""

    samples: Sequence[TokenizedExample]

    @cached_property
    def trunk(self) -> int:
        if len(self.samples) == 1:
            return len(self.samples[0].prompt_ids) - 1
        shortest = min(len(sample.prompt_ids) for sample in self.samples)
        ids = np.stack([sample.prompt_ids[:shortest] for sample in self.samples])
        return int(np.argmax((ids != ids[0]).any(axis=0)))

    @cached_property
    def num_tokens(self) -> int:
        return self.trunk + sum(len(sample.input_ids) - self.trunk for sample in self.samples)


@dataclass(frozen=True)
class Batch:
    """B rows of length L with T tokens to predict."""

    inputs: dict[str, torch.Tensor]
    """For the model: ids [B, L], positions [3, B, L], a mask [B, 1, L, L] (True: a token may look there), media."""
    before_targets: torch.Tensor
    """[T]; indices in the flattened rows of the tokens whose next token is part of an answer."""
    targets: torch.Tensor
    """[T]"""
    weights: torch.Tensor
    """[T]; sum to one."""


def training_batches(
    tokenizer: ChatTokenizer, *, seed: int, first_step: int = 0, part: int = 0, parts: int = 1
) -> Iterator[Batch]:
    """An endless stream of batches, or of one part in `parts` of each; the same arguments give the same stream."""
    for step in itertools.count(first_step):
        mix = [mix for start, mix in STAGES if start <= step][-1]
        groups = []
        for task, (number, asked) in mix.items():
            for index in range(part, number, parts):
                rng = random.Random(f"train/{seed}/{task}/{step}/{index}")
                groups.append(_group(rng, task, asked, tokenizer))
        yield pack(groups)


def _group(rng: random.Random, task: str, asked: Sequence[str], tokenizer: ChatTokenizer) -> Group:
    """Samples about the same scenes, no question twice."""
    scenes = LESSONS[task].scenes(rng)
    # Two pictures can only be told apart by their numbers; questions about one medium come with and without.
    vision_id = task == "compare" or rng.random() < 0.6
    media = see_media(scenes, codec=rng.random() < _CODEC_SHARE)
    examples = [Example(kind, scenes, *LESSONS[kind].ask(rng, scenes)) for kind in asked]
    different = {one.question: one for one in examples}
    return Group([tokenize_example(one, tokenizer, vision_id=vision_id, media=media) for one in different.values()])


def pack(groups: Sequence[Group]) -> Batch:
    """Groups in as few rows as first-fit finds, the longest first."""
    rows: list[list[Group]] = []
    for group in sorted(groups, key=lambda group: group.num_tokens, reverse=True):
        room = _ROW_LENGTH - group.num_tokens
        row = next((row for row in rows if _num_tokens(row) <= room), None)
        if row is None:
            rows.append(row := [])
        row.append(group)
    shape = len(rows), max(map(_num_tokens, rows))
    input_ids, group_of, branch_of = np.zeros(shape, np.int64), np.full(shape, -1), np.full(shape, -1)
    positions = np.zeros((3, *shape), np.int64)
    before_targets, targets, weights = [], [], []
    for index, row in enumerate(rows):
        end = 0
        for number, group in enumerate(row):
            # -1 is the trunk, as the first sample has it.
            for branch, sample in enumerate([group.samples[0], *group.samples], start=-1):
                tokens = slice(group.trunk, None) if branch >= 0 else slice(group.trunk)
                ids = sample.input_ids[tokens]
                place = index, slice(end, end + len(ids))
                input_ids[place], group_of[place], branch_of[place] = ids, number, branch
                positions[:, *place] = sample.positions[:, tokens]
                end += len(ids)
                if branch >= 0:
                    length = sample.num_answer_tokens
                    before_targets.append(index * shape[1] + np.arange(end - length - 1, end - 1))
                    targets.append(sample.answer_ids)
                    # Between a weight of one for each token and one for each answer: short answers are the hard ones.
                    weights.append(np.full(length, length**-0.5, np.float32))
    weight = np.concatenate(weights)
    return Batch(
        {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(positions),
            "attention_mask": torch.from_numpy(_mask(group_of, branch_of)),
            **media_inputs([medium for row in rows for group in row for medium in group.samples[0].media]),
        },
        torch.from_numpy(np.concatenate(before_targets)),
        torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        torch.from_numpy(weight / weight.sum()),
    )


def _num_tokens(row: Sequence[Group]) -> int:
    return sum(group.num_tokens for group in row)


def _mask(group_of: Ints, branch_of: Ints) -> npt.NDArray[np.bool_]:
    """[B, 1, L, L]: whether a token (row) may look at another (column)."""
    same_group = group_of[:, None, :, None] == group_of[:, None, None, :]
    seen_branch = branch_of[:, None, None, :]
    same_branch = (seen_branch == -1) | (seen_branch == branch_of[:, None, :, None])
    mask: npt.NDArray[np.bool_] = same_group & same_branch & np.tril(np.ones((group_of.shape[1],) * 2, dtype=bool))
    return mask


def media_inputs(media: Sequence[Medium]) -> dict[str, torch.Tensor]:
    """Pixel values and grids of media, by the names that transformers' model gives them."""
    inputs: dict[str, torch.Tensor] = {}
    for kind, values, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        mine = [medium for medium in media if medium.kind == kind]
        if mine:
            inputs[values] = _TO_PIXELS(torch.from_numpy(np.concatenate([medium.patches for medium in mine])), kind)
            inputs[grids] = torch.tensor([medium.grid_thw for medium in mine])
    return inputs
