"""The native engine: schedule a pass, run it, return what ended. The package's docstring describes the whole.

Knows the order of a step and what to do when memory runs out; the policy is the scheduler's, the tensors are the
runner's.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from pipeline.engine.admission import AdmissionRules
from pipeline.engine.attention.choose import pick_attention
from pipeline.engine.block_manager import BlockManager
from pipeline.engine.cuda_graph import DecodeGraphs
from pipeline.engine.device import current, gpu_name, is_alive
from pipeline.engine.encoded_media import EncodedMedia
from pipeline.engine.interface import Detokenize, Engine
from pipeline.engine.kv_cache import make_cache
from pipeline.engine.model_runner import ModelRunner, PassResult
from pipeline.engine.models.text_model import TextModel
from pipeline.engine.models.vision import VisionModel
from pipeline.engine.pixels import PixelTable
from pipeline.engine.scheduler import Plan, Scheduler
from pipeline.engine.sequence import Completion, Request, RequestId, Sequence, error_completions
from pipeline.engine.settings import EngineOptions
from pipeline.engine.shard import ShardedAttention
from pipeline.engine.stopping import StopRules
from pipeline.engine.warm_up import capture_largest_first, first_request
from pipeline.engine.weights import Checkpoint
from pipeline.errors import EngineOutOfMemory, RowError

MAX_LONE_FAILURES = 4
"""A row that runs out of memory alone in its pass this often, with ever smaller budgets, becomes an error."""

MAX_KEPT_VISUAL_TOKENS = 2**17
"""Visual tokens kept for waiting sequences that share media; above it the oldest are encoded again."""


class NativeEngine(Engine):
    """Continuous batching. One step is one pass: a packed prefill or a decode of all running sequences."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: EngineOptions,
        *,
        detokenize: Detokenize | None = None,
        overlap: bool | None = None,
    ) -> None:
        """With `overlap`, a pass's tokens are read after the next pass is launched; None: on a GPU, not on a CPU."""
        self.checkpoint = checkpoint
        self.options = options
        device, dtype, layer_devices = checkpoint.device, checkpoint.dtype, checkpoint.layer_devices
        on_gpu = device.type == "cuda"
        self.max_lag = int(on_gpu if overlap is None else overlap)
        attention = pick_attention(options.attention, device, dtype)
        sharded = len(set(layer_devices)) > 1
        if sharded:
            backends = {each: pick_attention(options.attention, each, dtype) for each in set(layer_devices)}
            attention = ShardedAttention(backends, vision=attention)
        self.rules = StopRules(checkpoint.eos_token_ids, detokenize)
        max_context = min(options.max_context or checkpoint.max_context, checkpoint.max_context)
        with torch.no_grad():
            text = TextModel(checkpoint.model)
            pixels = PixelTable(options, device=device, dtype=dtype)
            vision = VisionModel(checkpoint.model, attention, pixels)
        self.max_batch_tokens = options.max_batch_tokens or (16384 if on_gpu else 2048)
        self.max_batch_patches = options.max_batch_patches or 4 * self.max_batch_tokens
        self.cache = make_cache(
            options,
            layer_devices,
            max_context=max_context,
            block_size=attention.block_size,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            dtype=text.dtype,
        )
        self.media = EncodedMedia(MAX_KEPT_VISUAL_TOKENS)
        self.scheduler = Scheduler(
            BlockManager(self.cache.num_blocks, self.cache.block_size),
            self.media,
            max_running=options.max_running,
            max_batch_tokens=self.max_batch_tokens,
            max_batch_patches=self.max_batch_patches,
        )
        self.runner = ModelRunner(
            text,
            vision,
            attention,
            self.cache,
            self.media,
            self.rules,
            device=device,
            max_running=options.max_running,
            max_context=max_context,
        )
        if on_gpu and options.cuda_graphs is not False and attention.allows_graphs and not sharded:
            self.runner.graphs = DecodeGraphs(
                self.runner.decode_forward,
                self.runner.last_tokens,
                max_running=options.max_running,
                max_width=self.scheduler.blocks.blocks_for(max_context),
                scrap_slot=self.cache.scrap_slot,
            )
        self.admission = AdmissionRules(
            checkpoint.vocab_size,
            checkpoint.image_token_id,
            checkpoint.video_token_id,
            max_context,
            cache_tokens=self.cache.num_tokens,
            can_detokenize=detokenize is not None,
        )
        self._in_flight: deque[PassResult] = deque()
        self._done: list[Completion] = []
        self._lone_failures: dict[RequestId, int] = {}
        self._num_out_of_memory = 0
        self.warm_up_s = self._warm_up() if on_gpu else 0.0
        self.warm_up_graphs = self.runner.graphs.captured if self.runner.graphs else []

    # ---- the interface

    def add(self, request: Request) -> None:
        try:
            sequences = self.admission.admit(request)
        except RowError as error:
            self._done.extend(error_completions(request, error))
            return
        for sequence in sequences:
            self.scheduler.add(sequence)

    def step(self) -> list[Completion]:
        with current(self.checkpoint.device):
            self._step()
        done, self._done = self._done, []
        return done

    def has_unfinished(self) -> bool:
        return bool(self._done or self._in_flight or self.scheduler.has_unfinished)

    def abort(self, request_id: RequestId) -> None:
        for sequence in self.scheduler.find(request_id):
            sequence.finish("stop")
            self.scheduler.retire(sequence)
        self._lone_failures.pop(request_id, None)
        self._done = [completion for completion in self._done if completion.request_id != request_id]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "native",
            "model": self.checkpoint.name,
            "device": str(self.checkpoint.device),
            "gpu": gpu_name(self.checkpoint.device),
            "devices": len(set(self.checkpoint.layer_devices)),
            "dtype": str(self.checkpoint.dtype).removeprefix("torch."),
            "matmul_dtype": str(self.runner.text.lm_head.weight.dtype).removeprefix("torch."),
            "attention": self.runner.attention.name,
            "cuda_graphs": self.runner.graphs is not None,
            "warm_up_s": round(self.warm_up_s, 2),
            "warm_up_graphs": self.warm_up_graphs,
            "max_context": self.admission.max_context,
            "max_running": self.scheduler.max_running,
            "max_batch_tokens": self.max_batch_tokens,
            "max_batch_patches": self.max_batch_patches,
            "cache_bytes": self.cache.num_bytes,
            "cache_tokens": self.cache.num_tokens,
            "block_size": self.cache.block_size,
            "eos_token_ids": sorted(self.checkpoint.eos_token_ids),
        }

    def is_usable(self) -> bool:
        return all(is_alive(device) for device in {self.checkpoint.device, *self.checkpoint.layer_devices})

    def stats(self) -> dict[str, float]:
        blocks = self.scheduler.blocks
        return {
            "running": float(len(self.scheduler.admitted)),
            "waiting": float(len(self.scheduler.waiting)),
            "cache_use": blocks.num_used / blocks.num_blocks,
            "preemptions": float(self.scheduler.num_preemptions),
            "out_of_memory": float(self._num_out_of_memory),
            "max_batch_tokens": float(self.scheduler.batch_tokens.value),
            "graphs": float(len(self.runner.graphs.captured) if self.runner.graphs else 0),
            **{name: float(count) for name, count in self.runner.counts.items()},
            **{f"seconds_{phase}": seconds for phase, seconds in self.runner.seconds.items()},
        }

    # ---- inside a step

    def _step(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            try:
                self._in_flight.append(self.runner.run(plan, max_batch_patches=self.scheduler.batch_patches.value))
                self.scheduler.succeeded(plan)
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._recover(plan, error)
            except RuntimeError as error:
                if "can't allocate memory" not in str(error):  # torch's message on a CPU
                    raise
                self._recover(plan, error)
            self.runner.forget_media(self.media.forget(self._media_in_use()))
        self._collect(max_left=self.max_lag if plan is not None else 0)

    def _collect(self, *, max_left: int = 0) -> None:
        """Read the oldest passes in flight until `max_left` are left; their sequences continue or end."""
        while len(self._in_flight) > max_left:
            for sequence, token, logprob in self._in_flight.popleft().read():
                sequence.num_in_flight -= 1
                self.rules.append(sequence, token, logprob)
                if sequence.is_finished:
                    self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        self.scheduler.retire(sequence)
        self._lone_failures.pop(sequence.request.request_id, None)
        self._done.append(sequence.completion())

    def _media_in_use(self) -> set[bytes]:
        prefilling = self.scheduler.prefilling
        return {medium.content_key for medium in prefilling.request.media} if prefilling else set()

    def _recover(self, plan: Plan, error: BaseException) -> None:
        """Out of memory: read what is in flight, preempt this pass's sequences, and continue with smaller passes."""
        self._num_out_of_memory += 1
        self._collect()
        failed = [sequence for sequence in plan.sequences if not sequence.is_finished]
        for sequence in reversed(failed):
            self.scheduler.preempt(sequence)
        self.scheduler.ran_out_of_memory(plan)
        if len({id(sequence.request) for sequence in failed}) == 1:
            self._count_lone_failure(failed, error)
        if self.checkpoint.device.type == "cuda":
            torch.cuda.empty_cache()

    def _count_lone_failure(self, failed: list[Sequence], error: BaseException) -> None:
        """The samples of one request were alone in the pass that failed; after several such passes they are errors."""
        request = failed[0].request
        failures = self._lone_failures.get(request.request_id, 0) + 1
        self._lone_failures[request.request_id] = failures
        if failures < MAX_LONE_FAILURES:
            return
        for sequence in failed:
            sequence.error = EngineOutOfMemory(
                f"out of memory with this row alone ({sequence.num_prompt_tokens} prompt tokens, "
                f"{request.num_visual_tokens} visual): use fewer or smaller media, or leave more memory free of the "
                f"cache: {' '.join(str(error).split())[:200]}"
            )
            sequence.finish("error")
            self._retire(sequence)

    def _warm_up(self) -> float:
        """Answer one row and capture graphs, so that the first batch need not wait for that. Returns the seconds."""
        started = time.perf_counter()
        max_length = min(self.admission.max_context, self.cache.num_tokens)
        self.generate([first_request(self.admission.image_token_id, max_length=max_length)])
        graphs = self.runner.graphs
        if graphs is not None:
            with current(self.checkpoint.device), torch.inference_mode():
                capture_largest_first(set(graphs.sizes) - set(graphs.captured), graphs.capture)
        self.runner.reset_counts()
        return time.perf_counter() - started
