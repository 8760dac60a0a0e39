"""Train the demo checkpoint from nothing: transformers' own Qwen2-VL, fed by this package's preprocessing.

    python -m pipeline.demo.training.train --output FOLDER [--steps 3400] [--processes 2] [--seed 0] [--resume]

Writes a standard Hugging Face checkpoint into FOLDER (config, weights in bfloat16, tokenizer, chat template,
preprocessor, generation defaults, model card). The state of the training lies beside it in FOLDER.training/, saved
every few hundred steps: the same command with --resume goes on from there. Knows nothing of the job.

Each process has one thread, makes its own part of every batch and joins the others only to add up gradients: on a
busy machine that is faster than one process of many threads, which wait for each other at every operation.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy

from pipeline.demo.tasks import TASKS
from pipeline.demo.training import recipe
from pipeline.demo.training.batches import Batch, training_batches
from pipeline.demo.training.card import TrainingFacts, model_card
from pipeline.demo.training.evaluate import score
from pipeline.demo.training.optimiser import Muon
from pipeline.demo.training.tokens import special_token_ids, write_tokenizer
from pipeline.preprocess.prompt import ChatTokenizer

_WARM_UP_STEPS = 100
_COOL_DOWN_SHARE = 0.45
_AVERAGE_DECAY = 0.995


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=200, help="steps between saved states")
    parser.add_argument("--check-examples", type=int, default=50, help="held-out examples a task at each save")
    parser.add_argument("--final-examples", type=int, default=500, help="held-out examples a task for the model card")
    parser.add_argument("--resume", action="store_true", help="go on from the state beside the output folder")
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
    write_settings(folder)


def write_settings(folder: Path) -> None:
    """The preprocessors' and the generation settings, beside a written tokenizer."""
    token_ids, _ = special_token_ids(folder)
    for name, content in (
        ("preprocessor_config.json", recipe.image_processor_config()),
        ("video_preprocessor_config.json", recipe.video_processor_config()),
        ("generation_config.json", recipe.generation_config(token_ids)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class Training:
    """One process of a run: the model, its running average, the optimiser and the step they have reached."""

    def __init__(self, args: argparse.Namespace, rank: int = 0) -> None:
        from transformers import Qwen2VLForConditionalGeneration

        torch.set_num_threads(1)
        self.args, self.rank = args, rank
        self.output: Path = args.output
        self.state_file = self.output.parent / f"{self.output.name}.training" / "state.pt"
        token_ids, vocab_size = special_token_ids(self.output)
        torch.manual_seed(args.seed)
        self.model: Any = Qwen2VLForConditionalGeneration(recipe.model_config(vocab_size, token_ids))
        self.model.generation_config.update(**recipe.generation_config(token_ids))
        self.average: Any = copy.deepcopy(self.model).eval()
        _embed_by_product(self.model)
        self.parameters: list[torch.Tensor] = list(self.model.parameters())
        matrices, others = _split(self.model)
        self.muon = Muon(matrices, weight_decay=0.03, rank=rank, processes=args.processes)
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
        self.step, self.seconds = 0, 0.0
        if args.resume:
            self._load()
        self.tokenizer = ChatTokenizer(str(self.output))

    def run(self) -> None:
        """Train to the last step, then evaluate the weights as they were written and write the model card."""
        self._say(f"{_size(self.model) / 1e6:.2f} M parameters, steps {self.step} to {self.args.steps}")
        batches = training_batches(
            self.tokenizer,
            seed=self.args.seed,
            first_step=self.step,
            part=self.rank,
            parts=self.args.processes,
        )
        losses: list[float] = []
        while self.step < self.args.steps:
            started = time.perf_counter()
            losses.append(self._train_step(next(batches)))
            self.step += 1
            self.seconds += time.perf_counter() - started
            if self.step % 25 == 0 or self.step == self.args.steps:
                mean, rate = sum(losses) / len(losses), self.seconds / self.step
                self._say(f"step {self.step}  loss {mean:.4f}  lr {self._learning_rate():.2e}  {rate:.2f} s a step")
                losses.clear()
            if self.step % self.args.save_every == 0 and self.step < self.args.steps and self.rank == 0:
                self._save()
                self._check()
        if self.rank == 0:
            self._save()
            self._finish()

    def _train_step(self, batch: Batch) -> float:
        self.model.train()
        hidden = self.model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.image_grid_thw,
            pixel_values_videos=batch.pixel_values_videos,
            video_grid_thw=batch.video_grid_thw,
            use_cache=False,
        ).last_hidden_state
        # Only where an answer's token follows: the rest of the logits would be thrown away.
        logits = self.model.lm_head(hidden.flatten(0, 1)[batch.target_places])
        loss = (cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()
        torch.autograd.backward(loss)
        self._add_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self._learning_rate()
        self.adam.step()
        self.muon.step(self._learning_rate())
        self.model.zero_grad(set_to_none=True)
        decay = min(_AVERAGE_DECAY, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), self.parameters, 1 - decay)
        return float(loss.detach())

    def _add_gradients(self) -> None:
        if self.args.processes == 1:
            return
        gradients = [_gradient(parameter) for parameter in self.parameters]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(together)
        together /= self.args.processes
        parts = torch.split(together, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _learning_rate(self) -> float:
        """Linear warm-up, a plateau, and a linear way down to nothing over the last steps."""
        left = (self.args.steps - self.step) / (self.args.steps * _COOL_DOWN_SHARE)
        share = min(1.0, (self.step + 1) / _WARM_UP_STEPS, left)
        return float(self.args.learning_rate * max(share, 0.01))

    def _check(self) -> None:
        if not self.args.check_examples:
            return
        started = time.perf_counter()
        right = {task: score(self.average, self.tokenizer, task, self.args.check_examples, seed=1)[0] for task in TASKS}
        line = "  ".join(f"{task} {number / self.args.check_examples:.0%}" for task, number in right.items())
        self._say(f"  held out: {line}  ({time.perf_counter() - started:.0f} s)")

    def _save(self) -> None:
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "adam": self.adam.state_dict(),
            "momenta": self.muon.momenta,
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.state_file)

    def _load(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.adam.load_state_dict(state["adam"])
        self.muon.momenta = state["momenta"]
        self.step, self.seconds = state["step"], state["seconds"]

    def _finish(self) -> None:
        write_weights(self.average, self.output)
        write_settings(self.output)  # in place of the generation settings that transformers derives
        from transformers import Qwen2VLForConditionalGeneration

        written: Any = Qwen2VLForConditionalGeneration.from_pretrained(self.output, dtype=torch.float32).eval()
        accuracy = {}
        for task in TASKS if self.args.final_examples else ():
            right, _ = score(written, self.tokenizer, task, self.args.final_examples, seed=0)
            accuracy[task] = right / self.args.final_examples
            self._say(f"{task:<18}{accuracy[task]:>8.1%}")
        facts = TrainingFacts(
            command=f"python -m pipeline.demo.training.train --steps {self.args.steps} "
            f"--processes {self.args.processes}",
            seed=self.args.seed,
            steps=self.args.steps,
            minutes=self.seconds / 60,
            machine=f"{self.args.processes} cores, {platform.machine()}, torch {torch.__version__}",
            parameters=_size(written),
            held_out_examples=self.args.final_examples,
            exact_match=accuracy,
            note=self.args.note,
        )
        (self.output / "README.md").write_text(model_card(facts), encoding="utf-8")
        self._say(str(facts))

    def _say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


def write_weights(model: Any, folder: Path) -> None:
    """`config.json`, `generation_config.json` and `model.safetensors`, in bfloat16 as the family is published."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)


def _embed_by_product(model: Any) -> None:
    """Embed patches by one matrix product: the same numbers as the convolution, whose backward is slow on a CPU."""
    projection = model.model.visual.patch_embed.proj

    def forward(patches: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(patches, projection.weight.flatten(1))

    model.model.visual.patch_embed.forward = forward


def _split(model: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The layers' matrices; and word embeddings, norms and biases."""
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim < 2 or "embed_tokens" in name else matrices).append(parameter)
    return matrices, others


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
