"""Greedy answers to held-out questions, and the share of them that equal the truth, for each task.

    python -m pipeline.demo.training.evaluate [--checkpoint FOLDER] [--examples 500] [--seed 0] [--output results.json]

Knows the checkpoint through transformers alone, in float32; clips go through real H.264 files.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.demo import CHECKPOINT
from pipeline.demo.tasks import TASKS, example
from pipeline.demo.training.samples import Sample, make_sample, pixel_values
from pipeline.preprocess.prompt import ChatTokenizer

_MAX_TOKENS = 48


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--examples", type=int, default=500, help="held-out examples a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-vision-id", action="store_true", help="ask without `Picture 1: ` and `Video 1: `")
    parser.add_argument("--show-mistakes", type=int, default=0, help="mistakes to print for each task")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    from transformers import Qwen2VLForConditionalGeneration

    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    tokenizer = ChatTokenizer(str(args.checkpoint))
    started = time.perf_counter()
    print(f"{'task':<18}{'exact match':>12}{'right':>8}{'of':>6}")
    accuracy = {}
    for task in TASKS:
        right, mistakes = score(model, tokenizer, task, args.examples, seed=args.seed, vision_id=not args.no_vision_id)
        accuracy[task] = right / args.examples
        print(f"{task:<18}{accuracy[task]:>12.1%}{right:>8}{args.examples:>6}", flush=True)
        for mistake in mistakes[: args.show_mistakes]:
            print(f"    {mistake}")
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s")
    if args.output:
        report = {
            "examples": args.examples,
            "seed": args.seed,
            "vision_id": not args.no_vision_id,
            "exact_match": accuracy,
        }
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def score(
    model: Any,
    tokenizer: ChatTokenizer,
    task: str,
    examples: int,
    *,
    seed: int,
    vision_id: bool = True,
    batch_size: int = 50,
) -> tuple[int, list[str]]:
    """How many held-out examples of a task are answered exactly, and a line for each of the others."""
    right, mistakes = 0, []
    for start in range(0, examples, batch_size):
        made = [example(task, "held-out", seed, index) for index in range(start, min(start + batch_size, examples))]
        samples = [make_sample(one, tokenizer, vision_id=vision_id) for one in made]
        for one, token_ids in zip(made, greedy(model, samples, tokenizer), strict=True):
            text = tokenizer.decode(token_ids)
            right += text == one.answer
            if text != one.answer:
                mistakes.append(f"{one.question} -> {text} (truth: {one.answer})")
    return right, mistakes


@torch.inference_mode()
def greedy(model: Any, samples: Sequence[Sample], tokenizer: ChatTokenizer) -> list[list[int]]:
    """The tokens that the model finds likeliest, one after the other, for left-padded prompts in one batch."""
    longest = max(len(sample.prompt_ids) for sample in samples)
    input_ids = torch.zeros(len(samples), longest, dtype=torch.long)
    mask = torch.zeros(len(samples), longest, dtype=torch.long)
    positions = torch.zeros(3, len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        size = len(sample.prompt_ids)
        input_ids[row, longest - size :] = torch.from_numpy(sample.prompt_ids)
        mask[row, longest - size :] = 1
        positions[:, row, longest - size :] = torch.from_numpy(sample.positions[:, :size])
    following = torch.tensor([int(sample.positions[0, len(sample.prompt_ids)]) for sample in samples])
    out = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **_media(samples),
    )
    ends = set(_as_list(model.generation_config.eos_token_id) or _as_list(model.config.eos_token_id))
    answers: list[list[int]] = [[] for _ in samples]
    running = [True] * len(samples)
    for step in range(_MAX_TOKENS):
        tokens = out.logits[:, -1].argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            running[row] = running[row] and token not in ends
            if running[row]:
                answers[row].append(token)
        if not any(running):
            break
        mask = torch.cat([mask, torch.ones(len(samples), 1, dtype=torch.long)], dim=1)
        out = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=(following + step)[None, :, None].expand(3, -1, 1),
            past_key_values=out.past_key_values,
            use_cache=True,
        )
    return answers


def _media(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    media: dict[str, torch.Tensor] = {}
    if image_grids := [grid for sample in samples for grid in sample.image_grids]:
        patches = np.concatenate([sample.image_patches for sample in samples])
        media |= {"pixel_values": torch.from_numpy(pixel_values(patches)), "image_grid_thw": torch.tensor(image_grids)}
    if video_grids := [grid for sample in samples for grid in sample.video_grids]:
        patches = np.concatenate([sample.video_patches for sample in samples])
        media |= {
            "pixel_values_videos": torch.from_numpy(pixel_values(patches)),
            "video_grid_thw": torch.tensor(video_grids),
        }
    return media


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else ids


if __name__ == "__main__":
    main()
