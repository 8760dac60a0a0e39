"""The native engine: schedule a pass, run it, hand out what ended. See the package's page for the whole.

Knows the order of things and what to do when memory runs out; the policy is the scheduler's, the tensors are
the runner's.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.engine.admission import AdmissionRules
from pipeline.engine.attention.choose import pick_attention
from pipeline.engine.attention.interface import AttentionBackend, DecodeInfo
from pipeline.engine.block_manager import BlockManager
from pipeline.engine.cuda_graph import DecodeGraphs
from pipeline.engine.device import current
from pipeline.engine.interface import Detokenize, Engine
from pipeline.engine.kv_cache import KVCache, block_bytes
from pipeline.engine.media_ledger import MediaLedger
from pipeline.engine.model_runner import ModelRunner, PassResult, decode_forward
from pipeline.engine.models.text_model import TextModel
from pipeline.engine.models.vision import VisionModel
from pipeline.engine.pixels import PixelTable
from pipeline.engine.scheduler import Plan, PrefillPlan, Scheduler
from pipeline.engine.sequence import Completion, Request, RequestId, Sequence, error_completions
from pipeline.engine.settings import EngineOptions
from pipeline.engine.shard import ShardedAttention, ShardedCache
from pipeline.engine.stopping import StopRules
from pipeline.engine.warm_up import capture_largest_first, first_request
from pipeline.engine.weights import Checkpoint
from pipeline.errors import CheckpointError, EngineOutOfMemory, RowError

MAX_LONE_FAILURES = 4
"""A sequence that ran out of memory alone in its pass this often, with ever smaller budgets, is an error."""

KEPT_VISUAL_TOKENS = 2**17
"""Visual tokens kept for waiting sequences that share media; above it the oldest are encoded again."""


class NativeEngine(Engine):
    """One step is one pass: a packed prefill or a decode over all running sequences."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: EngineOptions,
        *,
        pixel_table: npt.NDArray[np.float32] | None = None,
        detokenize: Detokenize | None = None,
        overlap: bool | None = None,
    ) -> None:
        """`overlap` reads a pass's tokens after the next is launched; None is yes on a GPU, no on a CPU."""
        self.checkpoint = checkpoint
        self.options = options
        device, dtype = checkpoint.device, checkpoint.dtype
        on_gpu = device.type == "cuda"
        self.max_lag = int(on_gpu if overlap is None else overlap)
        sharded = len(set(checkpoint.layer_devices)) > 1
        attention = pick_attention(options.attention, device, dtype)
        if sharded:
            backends = {at: pick_attention(options.attention, at, dtype) for at in set(checkpoint.layer_devices)}
            attention = ShardedAttention(backends, vision=attention)
        self.rules = StopRules(checkpoint.eos_token_ids, detokenize)
        max_context = min(options.max_context or checkpoint.max_context, checkpoint.max_context)
        with torch.no_grad():
            text = TextModel(checkpoint.model)
            pixels = PixelTable(pixel_table, device=device, dtype=dtype)
            vision = VisionModel(checkpoint.model, attention, pixels)
        self.max_batch_tokens = options.max_batch_tokens or (16384 if on_gpu else 2048)
        self.max_batch_patches = options.max_batch_patches or 4 * self.max_batch_tokens
        self.cache = _make_cache(text, attention, options, checkpoint.layer_devices, max_context)
        blocks = BlockManager(self.cache.num_blocks, self.cache.block_size)
        self.ledger = MediaLedger(KEPT_VISUAL_TOKENS)
        self.scheduler = Scheduler(
            blocks,
            self.ledger,
            max_running=options.max_running,
            max_batch_tokens=self.max_batch_tokens,
            max_batch_patches=self.max_batch_patches,
        )
        self.runner = ModelRunner(
            text,
            vision,
            attention,
            self.cache,
            self.ledger,
            self.rules,
            device=device,
            max_running=options.max_running,
        )
        if on_gpu and options.cuda_graphs and attention.allows_graphs and not sharded:
            self.runner.graphs = self._make_graphs(max_context)
        self.admission = AdmissionRules(
            checkpoint.vocab_size,
            checkpoint.image_token_id,
            checkpoint.video_token_id,
            max_context,
            cache_tokens=self.cache.num_blocks * self.cache.block_size,
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
            layout = self.admission.lay_out(request)
        except RowError as error:
            self._done.extend(error_completions(request, error))
            return
        seed = request.sampling.seed
        seed = random.getrandbits(63) if seed is None else seed
        for index in range(request.sampling.n):
            self.scheduler.add(Sequence(request, index, seed, layout))

    def step(self) -> list[Completion]:
        with current(self.checkpoint.device):
            return self._step()

    def _step(self) -> list[Completion]:
        self._let_results_catch_up()
        plan = self.scheduler.schedule()
        if plan is not None:
            try:
                result = self.runner.run(plan, max_batch_patches=self.scheduler.max_batch_patches)
                self._in_flight.append(result)
                if isinstance(plan, PrefillPlan):
                    self.scheduler.prefill_succeeded()
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._recover(plan, error)
            except RuntimeError as error:
                if "can't allocate memory" not in str(error):  # how torch says it on a CPU
                    raise
                self._recover(plan, error)
            self.runner.forget_media(self.ledger.forget(self._media_in_use()))
        while len(self._in_flight) > (self.max_lag if plan is not None else 0):
            self._collect()
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
            "cache_tokens": self.cache.num_blocks * self.cache.block_size,
            "block_size": self.cache.block_size,
            "eos_token_ids": sorted(self.checkpoint.eos_token_ids),
        }

    def stats(self) -> dict[str, float]:
        blocks = self.scheduler.blocks
        return {
            "running": float(len(self.scheduler.running) + (self.scheduler.prefilling is not None)),
            "waiting": float(len(self.scheduler.waiting)),
            "cache_use": blocks.num_used / blocks.num_blocks,
            "preemptions": float(self.scheduler.num_preemptions),
            "out_of_memory": float(self._num_out_of_memory),
            "max_batch_tokens": float(self.scheduler.max_batch_tokens),
            "graphs": float(len(self.runner.graphs.captured) if self.runner.graphs else 0),
            **{name: float(count) for name, count in self.runner.counts.items()},
            **{f"seconds_{phase}": seconds for phase, seconds in self.runner.seconds.items()},
        }

    # ---- inside a step

    def _let_results_catch_up(self) -> None:
        """A repetition penalty needs every earlier token on the host before the next pass is planned."""
        if self._in_flight and any(s.sampling.repetition_penalty != 1.0 for s in self.scheduler.running):
            while self._in_flight:
                self._collect()

    def _collect(self) -> None:
        """Read the oldest pass in flight and let its sequences go on or end."""
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
        """Out of memory: read what is in flight, take this pass back, and go on with smaller ones."""
        self._num_out_of_memory += 1
        while self._in_flight:
            self._collect()
        failed = [s for s in plan.sequences if not s.is_finished]
        for sequence in reversed(failed):
            self.scheduler.preempt(sequence)
        self.scheduler.halve_budgets(plan)
        if len({id(sequence.request) for sequence in failed}) == 1:
            self._count_lone_failure(failed, error)
        if self.checkpoint.device.type == "cuda":
            torch.cuda.empty_cache()

    def _count_lone_failure(self, failed: list[Sequence], error: BaseException) -> None:
        """These samples of one request had the pass to themselves; too often is an error row."""
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
        """Answer one row and capture graphs, so that the first batch needn't wait for that. Seconds it took."""
        started = time.perf_counter()
        admission, graphs = self.admission, self.runner.graphs
        room = min(admission.max_context, admission.cache_tokens or admission.max_context)
        self.generate([first_request(admission.image_token_id, room=room)])
        if graphs is not None:
            with current(self.checkpoint.device), torch.inference_mode():
                capture_largest_first(set(graphs.sizes) - set(graphs.captured), graphs.capture)
        self.runner.reset_counts()
        return time.perf_counter() - started

    def _make_graphs(self, max_context: int) -> DecodeGraphs:
        runner = self.runner

        def forward(tokens: torch.Tensor, positions: torch.Tensor, info: DecodeInfo) -> torch.Tensor:
            return decode_forward(runner.text, runner.attention, self.cache, tokens, positions, info)

        return DecodeGraphs(
            forward,
            runner.last_tokens,
            max_running=self.options.max_running,
            max_width=self.scheduler.blocks.blocks_for(max_context),
            scrap_slot=self.cache.scrap_slot,
        )


def _make_cache(
    text: TextModel,
    attention: AttentionBackend,
    options: EngineOptions,
    layer_devices: SequenceOf[torch.device],
    max_context: int,
) -> KVCache:
    """As many blocks as the stated memory holds, on each device for its layers, and no more than could ever be used."""
    on_gpu = layer_devices[0].type == "cuda"
    size = attention.block_size
    shape = {"block_size": size, "num_kv_heads": text.num_kv_heads, "head_dim": text.head_dim}
    layers = Counter(layer_devices)
    most = options.max_running * -(-max_context // size)
    fit = []
    for device, num_layers in layers.items():
        if on_gpu:
            memory = options.cache_fraction * torch.cuda.mem_get_info(device)[0]
        else:
            memory = options.cache_gb * 1e9 * num_layers / len(layer_devices)
        per_block = block_bytes(num_layers=num_layers, **shape, dtype=text.dtype)
        fit.append(int(memory // per_block) - 1)
        if fit[-1] < 1:
            setting = "engine.cache_fraction" if on_gpu else "engine.cache_gb"
            raise CheckpointError(
                f"the key-value cache would get {memory / 1e9:.3f} GB, but one block of {size} tokens "
                f"takes {per_block / 1e9:.3f} GB; raise {setting}"
            )

    def make(device: torch.device, num_layers: int) -> KVCache:
        return KVCache(num_layers=num_layers, **shape, num_blocks=min(*fit, most), dtype=text.dtype, device=device)

    if len(layers) == 1:
        return make(layer_devices[0], len(layer_devices))
    return ShardedCache(layer_devices, make)
