"""The reference engine: `model.generate` in left-padded static batches, as the model's page shows it.

The tests compare the native engine with it, and the benchmarks measure against it. It knows nothing of
continuous batching: a batch ends with its longest row. Greedy rows go through transformers alone; as
soon as a row asks for more, our sampler chooses the tokens through a logits processor, so that seeds,
filters and log-probabilities mean the same in both engines.
"""

from __future__ import annotations

import random
import time
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor, StoppingCriteria

from pipeline.engine.admission import AdmissionRules
from pipeline.engine.device import current
from pipeline.engine.interface import Detokenize, Engine
from pipeline.engine.pixels import PixelTable
from pipeline.engine.sampler import sample, sample_row
from pipeline.engine.sequence import Completion, PromptLayout, Request, RequestId, Sequence, error_completions
from pipeline.engine.settings import EngineOptions
from pipeline.engine.stopping import StopRules
from pipeline.engine.weights import Checkpoint
from pipeline.errors import EngineOutOfMemory, RowError


class ReferenceEngine(Engine):
    """One step is one static batch, run to its end."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: EngineOptions,
        *,
        pixel_table: npt.NDArray[np.float32] | None = None,
        detokenize: Detokenize | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.pixels = PixelTable(pixel_table, device=checkpoint.device, dtype=checkpoint.dtype)
        self.rules = StopRules(checkpoint.eos_token_ids, detokenize)
        self.admission = AdmissionRules(
            checkpoint.vocab_size,
            checkpoint.image_token_id,
            checkpoint.video_token_id,
            min(options.max_context or checkpoint.max_context, checkpoint.max_context),
            can_detokenize=detokenize is not None,
        )
        self.attention = _pick_attention(checkpoint, options)
        checkpoint.model.set_attn_implementation(self.attention)
        self._waiting: deque[tuple[Sequence, PromptLayout]] = deque()
        self._done: list[Completion] = []
        self._stats = {"prefill_tokens": 0.0, "decode_tokens": 0.0, "batches": 0.0, "seconds": 0.0}

    def add(self, request: Request) -> None:
        try:
            layout = self.admission.lay_out(request)
        except RowError as error:
            self._done.extend(error_completions(request, error))
            return
        seed = request.sampling.seed
        seed = random.getrandbits(63) if seed is None else seed
        for index in range(request.sampling.n):
            self._waiting.append((Sequence(request, index, seed), layout))

    def step(self) -> list[Completion]:
        size = min(self.options.batch_size, len(self._waiting))
        batch = [self._waiting.popleft() for _ in range(size)]
        if batch:
            started = time.perf_counter()
            with current(self.checkpoint.device):
                self._run(batch)
            self._stats["seconds"] += time.perf_counter() - started
            self._done.extend(sequence.completion() for sequence, _ in batch)
        done, self._done = self._done, []
        return done

    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._done)

    def abort(self, request_id: RequestId) -> None:
        kept = [pair for pair in self._waiting if pair[0].request.request_id != request_id]
        self._waiting = deque(kept)
        self._done = [completion for completion in self._done if completion.request_id != request_id]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "transformers",
            "model": self.checkpoint.name,
            "device": str(self.checkpoint.device),
            "dtype": str(self.checkpoint.dtype).removeprefix("torch."),
            "attention": self.attention,
            "batch_size": self.options.batch_size,
            "max_context": self.admission.max_context,
            "eos_token_ids": sorted(self.checkpoint.eos_token_ids),
        }

    def stats(self) -> dict[str, float]:
        return {"running": 0.0, "waiting": float(len(self._waiting)), "preemptions": 0.0, **self._stats}

    def _run(self, batch: list[tuple[Sequence, PromptLayout]]) -> None:
        """Run one batch; out of memory halves it, and a row that fails alone becomes an error."""
        try:
            self._generate(batch)
        except torch.OutOfMemoryError as error:
            for sequence, _ in batch:
                sequence.output_ids.clear()
                sequence.logprobs.clear()
                if sequence.is_finished:
                    sequence.status = type(sequence.status).WAITING
            if len(batch) == 1:
                batch[0][0].error = EngineOutOfMemory(f"out of memory with this row alone: {error}")
                batch[0][0].finish("error")
                return
            self._run(batch[: len(batch) // 2])
            self._run(batch[len(batch) // 2 :])

    @torch.inference_mode()
    def _generate(self, batch: list[tuple[Sequence, PromptLayout]]) -> None:
        sequences = [sequence for sequence, _ in batch]
        inputs = self._inputs(batch)
        follow = _Follow(sequences, self.rules)
        needs_sampler = any(_needs_sampler(sequence) for sequence in sequences)
        pad = min(self.rules.eos_token_ids, default=0)
        self.checkpoint.model.generate(
            **inputs,
            generation_config=_plain_generation_config(
                max_new_tokens=max(sequence.sampling.max_tokens for sequence in sequences), pad_token_id=pad
            ),
            logits_processor=[_Choose(follow)] if needs_sampler else [],
            stopping_criteria=[follow],
        )
        self._stats["batches"] += 1
        self._stats["prefill_tokens"] += sum(sequence.num_prompt_tokens for sequence in sequences)
        self._stats["decode_tokens"] += sum(len(sequence.output_ids) for sequence in sequences)

    def _inputs(self, batch: list[tuple[Sequence, PromptLayout]]) -> dict[str, torch.Tensor]:
        """Left-padded ids, mask and positions [4, rows, tokens]: text index, then the three axes."""
        device = self.checkpoint.device
        width = max(sequence.num_prompt_tokens for sequence, _ in batch)
        ids = np.zeros((len(batch), width), dtype=np.int64)
        mask = np.zeros((len(batch), width), dtype=np.int64)
        positions = np.zeros((4, len(batch), width), dtype=np.int64)
        for row, (sequence, layout) in enumerate(batch):
            start = width - sequence.num_prompt_tokens
            ids[row, start:] = sequence.request.input_ids
            mask[row, start:] = 1
            positions[0, row, start:] = np.arange(sequence.num_prompt_tokens)
            positions[1:, row, start:] = layout.positions
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
        media = [medium for sequence, _ in batch for medium in sequence.request.media]
        for kind, values, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            mine = [medium for medium in media if medium.kind == kind]
            if mine:
                patches = np.concatenate([medium.patches for medium in mine])
                tensors[values] = self.pixels(torch.from_numpy(patches).to(device))
                tensors[grid] = torch.tensor([medium.grid_thw for medium in mine], device=device)
        return tensors


def _needs_sampler(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return bool(
        sampling.temperature > 0 or sampling.logprobs or sampling.min_tokens or sampling.repetition_penalty != 1.0
    )


def _plain_generation_config(**settings: Any) -> Any:
    """Greedy, with none of the checkpoint's sampling defaults; end tokens are the criterion's business."""
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=False, eos_token_id=None, use_cache=True, **settings)


def _pick_attention(checkpoint: Checkpoint, options: EngineOptions) -> str:
    from pipeline.engine.attention.choose import flash_attn_installed

    wants_flash = options.attention in ("auto", "flash")
    half = checkpoint.dtype in (torch.bfloat16, torch.float16)
    if wants_flash and checkpoint.device.type == "cuda" and half and flash_attn_installed():
        return "flash_attention_2"
    return "sdpa"


class _Follow(StoppingCriteria):  # type: ignore[misc]
    """Reads each token as it comes, gives it to its sequence, and says which rows have ended."""

    def __init__(self, sequences: list[Sequence], rules: StopRules) -> None:
        self.sequences = sequences
        self.rules = rules
        self.logprobs: list[float] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            sequence = self.sequences[row]
            if not sequence.is_finished:
                self.rules.append(sequence, token, self.logprobs[row] if self.logprobs else None)
        return torch.tensor([sequence.is_finished for sequence in self.sequences], device=input_ids.device)


class _Choose(LogitsProcessor):  # type: ignore[misc]
    """Lets our sampler choose: every other token's score becomes minus infinity."""

    def __init__(self, follow: _Follow) -> None:
        self.follow = follow

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rules, sequences = self.follow.rules, self.follow.sequences
        rows = [sample_row(sequence, rules, len(sequence.output_ids)) for sequence in sequences]
        tokens, logprobs = sample(scores, rows)
        self.follow.logprobs = None if logprobs is None else logprobs.tolist()
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)
