"""The reference engine: `model.generate` in left-padded static batches, as the model's card shows it.

The tests compare the native engine with it, and the benchmarks measure against it. A batch lasts as long as its longest
row. Greedy rows go through transformers alone; as soon as a row of the batch needs more, our sampler chooses the tokens
through a logits processor, so that seeds, filters and log-probabilities mean the same in both engines.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from pipeline.engine.attention.choose import flash_attn_installed
from pipeline.engine.device import current, gpu_name, is_alive, is_out_of_memory
from pipeline.engine.interface import Detokenize, Engine
from pipeline.engine.pixels import PixelTable
from pipeline.engine.sampler import SeenTokens, forbidden_tokens, sample, sample_rows, set_steps
from pipeline.engine.scheduling.admission import AdmissionRules
from pipeline.engine.scheduling.stopping import StopRules
from pipeline.engine.sequence import Completion, Request, RequestId, Sequence, error_completions
from pipeline.engine.settings import EngineOptions
from pipeline.engine.weights import Checkpoint
from pipeline.errors import EngineOutOfMemory, RowError


class ReferenceEngine(Engine):
    """Static batches. One step is one batch, run to its end."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: EngineOptions,
        *,
        detokenize: Detokenize | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.pixels = PixelTable(options, device=checkpoint.device, dtype=checkpoint.dtype)
        self.rules = StopRules(checkpoint.eos_token_ids, detokenize)
        self.admission = AdmissionRules(
            checkpoint.vocab_size,
            checkpoint.image_token_id,
            checkpoint.video_token_id,
            min(options.max_context or checkpoint.max_context, checkpoint.max_context),
            can_detokenize=detokenize is not None,
            positions=checkpoint.architecture.positions(checkpoint.model.config),
            patch_size=checkpoint.architecture.patch_size,
        )
        self.attention = _pick_attention(checkpoint, options)
        checkpoint.model.set_attn_implementation(self.attention)
        self._waiting: deque[Sequence] = deque()
        self._done: list[Completion] = []
        self._stats = {"prefill_tokens": 0.0, "decode_tokens": 0.0, "batches": 0.0, "seconds": 0.0}

    def add(self, request: Request) -> None:
        try:
            self._waiting.extend(self.admission.admit(request))
        except RowError as error:
            self._done.extend(error_completions(request, error))

    def step(self) -> list[Completion]:
        size = min(self.options.batch_size, len(self._waiting))
        batch = [self._waiting.popleft() for _ in range(size)]
        if batch:
            started = time.perf_counter()
            with current(self.checkpoint.device):
                self._run(batch)
            self._stats["seconds"] += time.perf_counter() - started
            self._done.extend(sequence.completion() for sequence in batch)
        done, self._done = self._done, []
        return done

    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._done)

    def abort(self, request_id: RequestId) -> None:
        self._waiting = deque(sequence for sequence in self._waiting if sequence.request.request_id != request_id)
        self._done = [completion for completion in self._done if completion.request_id != request_id]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "transformers",
            "model": self.checkpoint.name,
            "device": str(self.checkpoint.device),
            "gpu": gpu_name(self.checkpoint.device),
            "dtype": str(self.checkpoint.dtype).removeprefix("torch."),
            "dtype_reason": self.checkpoint.dtype_reason,
            "attention": self.attention,
            "batch_size": self.options.batch_size,
            "max_context": self.admission.max_context,
            "eos_token_ids": sorted(self.checkpoint.eos_token_ids),
        }

    def is_usable(self) -> bool:
        return is_alive(self.checkpoint.device)

    def stats(self) -> dict[str, float]:
        return {"running": 0.0, "waiting": float(len(self._waiting)), "preemptions": 0.0, **self._stats}

    def _run(self, batch: list[Sequence]) -> None:
        """Run one batch. Out of memory halves it; a row that fails alone becomes an error."""
        try:
            self._generate(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            for sequence in batch:
                sequence.output_ids.clear()
                sequence.logprobs.clear()
                sequence.finish_reason, sequence.stop_reason, sequence.num_cut = None, None, 0
            if len(batch) == 1:
                batch[0].error = EngineOutOfMemory(f"out of memory with this row alone: {error}")
                batch[0].finish("error")
                return
            self._run(batch[: len(batch) // 2])
            self._run(batch[len(batch) // 2 :])

    @torch.inference_mode()
    def _generate(self, batch: list[Sequence]) -> None:
        follow = _Follow(batch, self.rules)
        with without_defaults(self.checkpoint.model) as model:
            model.generate(
                **self.inputs(batch),
                generation_config=plain_generation_config(
                    max_new_tokens=max(sequence.sampling.max_tokens for sequence in batch),
                    pad_token_id=min(self.rules.eos_token_ids, default=0),
                ),
                logits_processor=[_Choose(follow)] if any(map(_needs_sampler, batch)) else [],
                stopping_criteria=[follow],
            )
        self._stats["batches"] += 1
        self._stats["prefill_tokens"] += sum(sequence.num_prompt_tokens for sequence in batch)
        self._stats["decode_tokens"] += sum(len(sequence.output_ids) for sequence in batch)

    def inputs(self, batch: list[Sequence]) -> dict[str, torch.Tensor]:
        """The model's inputs: left-padded ids and mask, positions [4, rows, tokens] (text index, then the three axes),
        pixel values and grids."""
        device = self.checkpoint.device
        width = max(sequence.num_prompt_tokens for sequence in batch)
        ids, mask = np.zeros((2, len(batch), width), dtype=np.int64)
        positions = np.zeros((4, len(batch), width), dtype=np.int64)
        for row, sequence in enumerate(batch):
            start = width - sequence.num_prompt_tokens
            ids[row, start:] = sequence.request.input_ids
            mask[row, start:] = 1
            positions[0, row, start:] = np.arange(sequence.num_prompt_tokens)
            positions[1:, row, start:] = sequence.layout.positions
        arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        for kind, values, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            media = [medium for sequence in batch for medium in sequence.request.media if medium.kind == kind]
            if media:
                patches = np.concatenate([medium.patches for medium in media])
                tensors[values] = self.pixels(torch.from_numpy(patches).to(device), kind)
                tensors[grid] = torch.tensor([medium.grid_thw for medium in media], device=device)
        return tensors


def _needs_sampler(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return bool(sampling.temperature > 0 or sampling.logprobs or sampling.min_tokens or sampling.is_penalized)


@contextmanager
def without_defaults(model: Any) -> Iterator[Any]:
    """The model without the checkpoint's generation config, from which `generate` fills whatever a given one leaves
    open: penalties, end tokens, forbidden tokens."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = own


def plain_generation_config(**settings: Any) -> Any:
    """Greedy; `_Follow` decides when a row ends."""
    return GenerationConfig(do_sample=False, eos_token_id=None, use_cache=True, **settings)


def _pick_attention(checkpoint: Checkpoint, options: EngineOptions) -> str:
    half = checkpoint.dtype in (torch.bfloat16, torch.float16)
    can_flash = checkpoint.device.type == "cuda" and half and flash_attn_installed()
    return "flash_attention_2" if can_flash and options.attention in ("auto", "flash") else "sdpa"


class _Follow(StoppingCriteria):  # type: ignore[misc]
    """Appends each new token to its sequence, and reports which rows have ended."""

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
    """Lets our sampler choose: the score of every other token becomes minus infinity."""

    def __init__(self, follow: _Follow) -> None:
        self.follow = follow

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rules, sequences = self.follow.rules, self.follow.sequences
        rows = sample_rows([sequence.sampling for sequence in sequences], sequences)
        set_steps(rows, np.asarray([len(sequence.output_ids) for sequence in sequences]))
        forbidden = forbidden_tokens(rows, sequences, rules)
        tokens, logprobs = sample(scores, rows, self._seen(sequences, scores), forbidden)
        self.follow.logprobs = None if logprobs is None else logprobs.tolist()
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

    def _seen(self, sequences: list[Sequence], scores: torch.Tensor) -> torch.Tensor | None:
        if not any(sequence.sampling.is_penalized for sequence in sequences):
            return None
        longest = max(sequence.num_tokens for sequence in sequences)
        seen = SeenTokens(len(sequences), longest, scores.device)
        seen.restart(range(len(sequences)), [sequence.known_ids(0, sequence.num_tokens) for sequence in sequences])
        return seen.of(torch.arange(len(sequences), device=scores.device), longest)
