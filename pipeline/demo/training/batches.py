"""Training batches: questions that share a beginning share its tokens, and are packed side by side into rows.

Knows samples and tensors; not the model's layers or the optimiser.

    row 0   [system prompt][picture   ][question a, answer a][question b, answer b][clip      ][question c, answer c]
            `- for all  -' `- for a and b                                         '`- for c                          '

A token attends to the earlier ones of its own branch, to its branch's media and to the system prompt: what it sees,
and where, is what it would see alone. One picture thus teaches five questions for little more than the cost of one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipeline.demo.tasks import LESSONS, Example
from pipeline.demo.training.samples import Sample, make_samples, pixel_values
from pipeline.preprocess.prompt import TURN_END, TURN_START, ChatTokenizer

_PICTURE = ("describe_image", "count", "count", "yes_no", "yes_no")
Groups: TypeAlias = Mapping[str, tuple[int, tuple[str, ...]]]
"""How many groups of questions a batch holds by the task whose scenes they are about, and what is asked of each."""

# At first, descriptions above all: every object's colour, shape and place in words is what teaches the model to see.
_SEEING: Groups = {
    "describe_image": (12, ("describe_image", "count", "yes_no")),
    "count": (2, _PICTURE),
    "describe_video": (2, ("describe_video",)),
    "text": (2, ("text",) * 2),
}
_ALL_TASKS: Groups = {
    "describe_image": (6, _PICTURE),
    "count": (6, _PICTURE),
    "describe_video": (8, ("describe_video",)),
    "compare": (6, ("compare",) * 3),
    "image_and_video": (6, ("image_and_video",)),
    "text": (4, ("text",) * 4),
}
# What is learned late gets more, what is learned early less.
_LATE_TASKS: Groups = {
    **_ALL_TASKS,
    "describe_video": (14, ("describe_video",)),
    "image_and_video": (3, ("image_and_video",)),
    "text": (6, ("text",) * 4),
}
_HARD_PARTS: Groups = {
    "describe_image": (6, ("describe_image", "count", "yes_no", "bound", "bound")),
    "bound": (2, ("bound",) * 4),
    "count": (6, _PICTURE),
    "describe_video": (12, ("describe_video",)),
    "compare": (6, ("compare",) * 3),
    "image_and_video": (2, ("image_and_video",)),
    "text": (2, ("text",) * 4),
    "order": (4, ("order",) * 6),
}
_HARDEST_PART: Groups = {
    **_HARD_PARTS,
    "describe_video": (2, ("describe_video",)),
    "move_and_stay": (14, ("describe_video",)),
    "bound": (1, ("bound",) * 4),
    "order": (2, ("order",) * 6),
}
_LAST_PARTS: Groups = {
    **_HARDEST_PART,
    "count": (3, _PICTURE),
    "count_three": (6, ("describe_image", "count", "count", "count", "bound", "bound")),
}
STAGES: Sequence[tuple[int, Groups]] = (
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

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """B rows of length L."""

    input_ids: torch.Tensor
    """[B, L]"""
    positions: torch.Tensor
    """[3, B, L]"""
    mask: torch.Tensor
    """[B, 1, L, L]; True where a token may look."""
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    pixel_values_videos: torch.Tensor | None
    video_grid_thw: torch.Tensor | None
    target_places: torch.Tensor
    """[T]; places in the flattened rows whose next token is part of an answer."""
    targets: torch.Tensor
    """[T]"""
    weights: torch.Tensor
    """[T]; sum to one."""


def training_batches(
    tokenizer: ChatTokenizer, *, seed: int, first_step: int = 0, part: int = 0, parts: int = 1
) -> Iterator[Batch]:
    """An endless stream of batches, or of one part in `parts` of each; the same arguments give the same stream."""
    prefix_length = _system_prefix_length(tokenizer)
    step = first_step
    while True:
        groups = []
        for task, (number, asked) in _groups_at(step).items():
            for index in range(number):
                if index % parts == part:
                    rng = random.Random(f"train/{seed}/{task}/{step}/{index}")
                    groups.append(_group(rng, task, asked, tokenizer))
        yield pack(groups, prefix_length)
        step += 1


def _groups_at(step: int) -> Groups:
    return [groups for start, groups in STAGES if start <= step][-1]


def pack(groups: Sequence[Sequence[Sample]], prefix_length: int, row_length: int = _ROW_LENGTH) -> Batch:
    """Groups into as few rows as first-fit finds, the longest first.

    The samples of a group share media; all samples share their first `prefix_length` tokens.
    """
    trunks = {id(group): _shared_length(group) for group in groups}

    def length(group: Sequence[Sample]) -> int:
        trunk = trunks[id(group)]
        return trunk - prefix_length + sum(_length(sample) - trunk for sample in group)

    rows: list[list[Sequence[Sample]]] = []
    for group in sorted(groups, key=length, reverse=True):
        room = row_length - prefix_length - length(group)
        fitting = next((row for row in rows if sum(map(length, row)) <= room), None)
        if fitting is None:
            rows.append([group])
        else:
            fitting.append(group)
    shape = len(rows), prefix_length + max(sum(map(length, row)) for row in rows)
    input_ids, group_of, branch_of = np.zeros(shape, np.int64), np.full(shape, -2), np.full(shape, -1)
    positions = np.zeros((3, *shape), np.int64)
    places, targets, weights = [], [], []
    for index, row in enumerate(rows):

        def put(sample: Sample, first: int, last: int, at: int, group: int, branch: int, index: int = index) -> int:
            """Tokens `first` to `last` of a sample go to `at`; returns the place after them."""
            end = at + last - first
            input_ids[index, at:end] = np.concatenate([sample.prompt_ids, sample.answer_ids])[first:last]
            positions[:, index, at:end] = sample.positions[:, first:last]
            group_of[index, at:end], branch_of[index, at:end] = group, branch
            return end

        place = put(row[0][0], 0, prefix_length, 0, -1, -1)
        for group_number, group in enumerate(row):
            trunk = trunks[id(group)]
            place = put(group[0], prefix_length, trunk, place, group_number, -1)
            for branch_number, sample in enumerate(group):
                place = put(sample, trunk, _length(sample), place, group_number, branch_number)
                answer_length = len(sample.answer_ids)
                places.append(index * shape[1] + np.arange(place - answer_length - 1, place - 1))
                targets.append(sample.answer_ids)
                # Between one vote a token and one vote an answer: short answers carry the hard bit.
                weights.append(np.full(answer_length, answer_length**-0.5, np.float32))
    ordered = [group[0] for row in rows for group in row]
    weight = np.concatenate(weights)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(positions),
        torch.from_numpy(_mask(group_of, branch_of)),
        *_pixels([s.image_patches for s in ordered], [grid for s in ordered for grid in s.image_grids]),
        *_pixels([s.video_patches for s in ordered], [grid for s in ordered for grid in s.video_grids]),
        torch.from_numpy(np.concatenate(places)),
        torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        torch.from_numpy(weight / weight.sum()),
    )


def _mask(group_of: Ints, branch_of: Ints) -> npt.NDArray[np.bool_]:
    """[B, 1, L, L]: whether a token (row) may look at another (column); -1 is the shared part, -2 padding."""
    look_group, seen_group = group_of[:, None, :, None], group_of[:, None, None, :]
    look_branch, seen_branch = branch_of[:, None, :, None], branch_of[:, None, None, :]
    same_branch = (seen_branch == -1) | (seen_branch == look_branch)
    related = (seen_group == -1) | ((seen_group == look_group) & same_branch)
    mask: npt.NDArray[np.bool_] = related & np.tril(np.ones((group_of.shape[1],) * 2, dtype=bool))
    return mask


def _pixels(
    patches: list[npt.NDArray[np.uint8]], grids: list[tuple[int, int, int]]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not grids:
        return None, None
    return torch.from_numpy(pixel_values(np.concatenate(patches))), torch.tensor(grids)


def _group(rng: random.Random, task: str, asked: Sequence[str], tokenizer: ChatTokenizer) -> list[Sample]:
    """Samples about the same scenes, no question twice."""
    media = LESSONS[task].scenes(rng)
    # Two pictures can only be told apart by their numbers; one medium is asked about with and without.
    vision_id = task == "compare" or rng.random() < 0.6
    codec = rng.random() < _CODEC_SHARE
    made = {}
    for kind in asked:
        question, answer = LESSONS[kind].ask(rng, media)
        made[question] = Example(kind, media, question, answer)
    return make_samples(list(made.values()), tokenizer, vision_id=vision_id, codec=codec)


def _shared_length(group: Sequence[Sample]) -> int:
    """How many tokens all prompts of a group begin with; those of the media are among them."""
    if len(group) == 1:
        return len(group[0].prompt_ids) - 1
    shortest = min(len(sample.prompt_ids) for sample in group)
    ids = np.stack([sample.prompt_ids[:shortest] for sample in group])
    return int(np.argmax((ids != ids[0]).any(axis=0)))


def _system_prefix_length(tokenizer: ChatTokenizer) -> int:
    """Tokens before the user's own: the system prompt and the opening of the turn."""
    empty = Example("text", (), "", "")
    sample = make_samples([empty], tokenizer, vision_id=False)[0]
    end = tokenizer.encode(f"{TURN_END}\n{TURN_START}assistant\n", [])
    return len(sample.prompt_ids) - len(end)


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.answer_ids)
