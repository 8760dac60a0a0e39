"""Greedy answers to held-out questions, and the share of them that equal the truth, for each task.

    python -m pipeline.demo.training.evaluate [--checkpoint FOLDER] [--examples 500] [--seed 0]

The answers come from transformers' `generate` in float32; clips go through real H.264 files.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from pipeline.demo import CHECKPOINT
from pipeline.demo.tasks import TASKS, example
from pipeline.demo.training.samples import tokenize_example
from pipeline.engine import Engine, EngineOptions, Request, SamplingParams
from pipeline.engine.load import load_engine
from pipeline.preprocess.prompt import ChatTokenizer

_MAX_TOKENS = 48
_BATCH_SIZE = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--examples", type=int, default=500, help="held-out examples a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show-mistakes", type=int, default=0, help="mistakes to print for each task")
    args = parser.parse_args()
    engine, tokenizer = load_engine(transformers_options(args.checkpoint)), ChatTokenizer(str(args.checkpoint))
    started = time.perf_counter()
    print(f"{'task':<18}{'exact match':>12}{'right':>8}{'of':>6}")
    for task in TASKS:
        right, mistakes = score(engine, tokenizer, task, args.examples, seed=args.seed)
        print(f"{task:<18}{right / args.examples:>12.1%}{right:>8}{args.examples:>6}", flush=True)
        for mistake in mistakes[: args.show_mistakes]:
            print(f"    {mistake}")
    print(f"{time.perf_counter() - started:.0f} s")


def transformers_options(checkpoint: Path | str) -> EngineOptions:
    """Options for the engine that runs transformers' `generate`, in float32."""
    return EngineOptions(str(checkpoint), kind="transformers", dtype="float32", device="cpu", batch_size=_BATCH_SIZE)


def score(
    engine: Engine, tokenizer: ChatTokenizer, task: str, num_examples: int, *, seed: int
) -> tuple[int, list[str]]:
    """How many held-out examples of a task are answered exactly, and a line for each of the others."""
    right, mistakes = 0, []
    for start in range(0, num_examples, _BATCH_SIZE):
        indices = range(start, min(start + _BATCH_SIZE, num_examples))
        examples = [example(task, "held-out", seed, index) for index in indices]
        requests = []
        for index, one in zip(indices, examples, strict=True):
            sample = tokenize_example(one, tokenizer, vision_id=True)
            requests.append(Request(index, sample.prompt_ids, sample.media, SamplingParams(max_tokens=_MAX_TOKENS)))
        for one, completion in zip(examples, engine.generate(requests), strict=True):
            text = tokenizer.decode(completion.token_ids)
            right += text == one.answer
            if text != one.answer:
                mistakes.append(f"{one.question} -> {text} (truth: {one.answer})")
    return right, mistakes


if __name__ == "__main__":
    main()
