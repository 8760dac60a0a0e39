"""Train the demo checkpoint from nothing: transformers' own Qwen2-VL, fed by this package's preprocessing.

    python -m pipeline.demo.training.train --output FOLDER [--steps 3400] [--processes 2] [--seed 0] [--resume]

Writes a standard Hugging Face checkpoint into FOLDER (config, weights in bfloat16, tokenizer, chat template,
preprocessor, generation defaults, model card). The state of the training is saved every few hundred steps beside it, in
FOLDER.training/: the same command with --resume continues from there. Knows nothing of the job.

Each process has one thread, makes its own part of every batch and meets the others only to add up gradients: on a
busy machine that is faster than one process of many threads, which wait for each other at every operation.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy, linear

from pipeline.demo import CHECKPOINT
from pipeline.demo.tasks import PLAIN_PROMPTS, TASKS
from pipeline.demo.training import recipe
from pipeline.demo.training.batches import Batch, training_batches
from pipeline.demo.training.card import model_card
from pipeline.demo.training.evaluate import score, transformers_options
from pipeline.demo.training.tokens import special_token_ids, write_tokenizer
from pipeline.engine import Engine
from pipeline.engine.load import load_engine
from pipeline.engine.reference import ReferenceEngine
from pipeline.engine.weights import from_model
from pipeline.preprocess.prompt import ChatTokenizer

_WARM_UP_STEPS = 100
_COOL_DOWN_SHARE = 0.45
_AVERAGE_DECAY = 0.995
_MUON_FACTOR = 2.0
"""Muon's learning rate in parts of AdamW's."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=200, help="steps between saved states")
    parser.add_argument("--check-examples", type=int, default=50, help="held-out examples a task at each save")
    parser.add_argument("--final-examples", type=int, default=500, help="held-out examples a task for the model card")
    parser.add_argument("--resume", action="store_true", help="continue from the state beside the output folder")
    parser.add_argument("--note", default="", help="a sentence for the model card")
    args = parser.parse_args(argv)
    if not args.resume:
        prepare(args.output)
    if args.processes == 1:
        Training(args).run()
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(_join, (args, f"file://{folder}/meeting"), nprocs=args.processes)  # type: ignore[no-untyped-call]


def _join(rank: int, args: argparse.Namespace, meeting: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.processes)
    try:
        Training(args, rank).run()
    finally:
        torch.distributed.destroy_process_group()


def prepare(folder: Path) -> None:
    """Write everything of the checkpoint that needs no training."""
    write_tokenizer(folder)
    for name in recipe.PROCESSOR_FILES:
        shutil.copyfile(CHECKPOINT / name, folder / name)


def new_model(folder: Path, seed: int) -> Any:
    """A model with random weights, for the tokenizer in the folder."""
    from transformers import Qwen2VLForConditionalGeneration

    token_ids, vocab_size = special_token_ids(folder)
    torch.manual_seed(seed)
    model: Any = Qwen2VLForConditionalGeneration(recipe.model_config(vocab_size, token_ids))
    model.generation_config.update(**recipe.generation_config(token_ids))
    return model


class Training:
    """One process of a run: the model, its running average, the optimisers and the step they have reached."""

    def __init__(self, args: argparse.Namespace, rank: int = 0) -> None:
        torch.set_num_threads(1)
        self.args, self.rank = args, rank
        self.output: Path = args.output
        self.state_file = self.output.parent / f"{self.output.name}.training" / "state.pt"
        self.model = new_model(self.output, args.seed)
        self.average: Any = copy.deepcopy(self.model).eval()
        matrices, others = trained_parameters(self.model)
        self.parameters = [*matrices, *others]
        # A patch's brightness and tint outweigh its edges a hundredfold, so that AdamW, which scales each number by
        # itself, learns colours at once and shapes late. Muon makes an update equally long in every direction and
        # learns both together. It is for the layers' matrices; their root mean square is matched to AdamW's.
        self.muon = torch.optim.Muon(matrices, weight_decay=0.03 / _MUON_FACTOR, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
        self.parts = {"model": self.model, "average": self.average, "adam": self.adam, "muon": self.muon}
        self.step, self.seconds = 0, 0.0
        if args.resume:
            self._load()
        self.tokenizer = ChatTokenizer(str(self.output))

    def run(self) -> None:
        """Train to the last step, then evaluate the weights as they were written and write the model card."""
        args = self.args
        self._print(f"{_size(self.model) / 1e6:.2f} M parameters, steps {self.step} to {args.steps}")
        batches = training_batches(
            self.tokenizer, seed=args.seed, first_step=self.step, part=self.rank, parts=args.processes
        )
        losses: list[float] = []
        while self.step < args.steps:
            started = time.perf_counter()
            losses.append(self._train_step(next(batches)))
            self.step += 1
            self.seconds += time.perf_counter() - started
            if self.step % 25 == 0 or self.step == args.steps:
                mean, rate = sum(losses) / len(losses), self.seconds / self.step
                self._print(f"step {self.step}  loss {mean:.4f}  lr {self._learning_rate():.2e}  {rate:.2f} s a step")
                losses.clear()
            if self.step % args.save_every == 0 and self.step < args.steps and self.rank == 0:
                self._save()
                self._check()
        if self.rank == 0:
            self._save()
            self._finish()

    def _train_step(self, batch: Batch) -> float:
        self.model.train()
        loss = answer_loss(self.model, batch)
        torch.autograd.backward(loss)
        if self.args.processes > 1:
            for parameter in self.parameters:
                assert parameter.grad is not None
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.args.processes
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser, factor in ((self.adam, 1.0), (self.muon, _MUON_FACTOR)):
            for group in optimiser.param_groups:
                group["lr"] = self._learning_rate() * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        decay = min(_AVERAGE_DECAY, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return float(loss.detach())

    def _learning_rate(self) -> float:
        """Linear warm-up, a plateau, and a linear way down to nothing over the last steps."""
        left = (self.args.steps - self.step) / (self.args.steps * _COOL_DOWN_SHARE)
        share = min(1.0, (self.step + 1) / _WARM_UP_STEPS, left)
        return float(self.args.learning_rate * max(share, 0.01))

    def _check(self) -> None:
        if self.args.check_examples:
            started = time.perf_counter()
            engine = ReferenceEngine(from_model(self.average), transformers_options("the average"))
            accuracy = self._accuracy(engine, self.args.check_examples, seed=1)
            line = "  ".join(f"{task} {share:.0%}" for task, share in accuracy.items())
            self._print(f"  held out: {line}  ({time.perf_counter() - started:.0f} s)")

    def _accuracy(self, engine: Engine, num_examples: int, *, seed: int) -> dict[str, float]:
        return {task: score(engine, self.tokenizer, task, num_examples, seed=seed)[0] / num_examples for task in TASKS}

    def _save(self) -> None:
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        partial = self.state_file.with_suffix(".partial")
        torch.save({**state, "step": self.step, "seconds": self.seconds}, partial)
        partial.replace(self.state_file)

    def _load(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]

    def _finish(self) -> None:
        """Write the averaged weights in bfloat16, as the family is published, and the model card. config.json states
        float32, so that answers are the same on every machine."""
        args = self.args
        copy.deepcopy(self.average).to(torch.bfloat16).save_pretrained(self.output)
        config = self.output / "config.json"
        config.write_text(config.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'), encoding="utf-8")
        # In place of the generation settings that transformers derives:
        settings = json.dumps(recipe.generation_config(special_token_ids(self.output)[0]), indent=2)
        (self.output / "generation_config.json").write_text(settings + "\n", encoding="utf-8")
        accuracy = {}
        if args.final_examples:
            accuracy = self._accuracy(load_engine(transformers_options(self.output)), args.final_examples, seed=0)
        command = f"python -m pipeline.demo.training.train --steps {args.steps} --processes {args.processes}"
        machine = f"{args.processes} cores, {platform.machine()}, torch {torch.__version__}"
        minutes = f"{self.seconds / 60:.0f} minutes ({machine})"
        card = model_card(
            made_by=f"`{command}` with seed {args.seed}: {args.steps} steps in\n{minutes}",
            num_parameters=_size(self.model),
            num_examples=args.final_examples,
            exact_match=accuracy,
            note=args.note,
        )
        (self.output / "README.md").write_text(card, encoding="utf-8")
        (self.output / "prompts.json").write_text(json.dumps({"templates": PLAIN_PROMPTS}) + "\n", encoding="utf-8")
        self._print(card)

    def _print(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


def trained_parameters(model: Any) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The layers' matrices; and word embeddings, norms and biases.

    Makes the model embed patches by one matrix product: the same numbers as the convolution, whose backward pass is
    slow on a CPU. The matrix is the convolution's own memory.
    """
    embedding = model.model.visual.patch_embed
    projection = torch.nn.Parameter(embedding.proj.weight.detach().flatten(1))
    embedding.proj.weight.requires_grad_(False)
    embedding.forward = lambda patches: linear(patches, projection)
    matrices: list[torch.nn.Parameter] = [projection]
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim < 2 or "embed_tokens" in name else matrices).append(parameter)
    return matrices, others


def answer_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The batch's weighted cross entropy. Computes logits only where a token of an answer follows."""
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[batch.before_targets])
    return (cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
