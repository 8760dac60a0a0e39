"""The native engine before its first row: its parts chosen by trial, and on a GPU the cache sized by the largest pass.

What a choice is put into is assembly.py's; the steps are loop.py's. The package's docstring describes the whole.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.engine.assembly import AssembledEngine
from pipeline.engine.attention.fastest import choose_prefill
from pipeline.engine.attention.interface import AttentionBackend
from pipeline.engine.attention.sample import run_every_shape
from pipeline.engine.attention.vision import choose_vision
from pipeline.engine.cuda_graph import DecodeGraphs
from pipeline.engine.device import current, gpu_name, is_out_of_memory
from pipeline.engine.interface import Detokenize
from pipeline.engine.kernels.choose import kernel_candidates
from pipeline.engine.kernels.eager import EagerKernels
from pipeline.engine.kernels.sample import run_every_operation
from pipeline.engine.kv_cache import bytes_for_cache
from pipeline.engine.sampler import sample, sample_rows
from pipeline.engine.scheduling.scheduler import MOST_RUNNING
from pipeline.engine.sequence import Request
from pipeline.engine.settings import EngineOptions, SamplingParams
from pipeline.engine.trial import Candidate, Trial
from pipeline.engine.warm_up import MAX_VISUAL_TOKENS, capture_largest_first, first_request, full_pass
from pipeline.engine.weights import Checkpoint
from pipeline.errors import CheckpointError, first_line

log = logging.getLogger(__name__)


class NativeEngine(AssembledEngine):
    """The engine of a checkpoint, loaded and ready."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: EngineOptions,
        *,
        detokenize: Detokenize | None = None,
        overlap: bool | None = None,
    ) -> None:
        """With `overlap`, a pass's tokens are read after the next pass is launched; None: on a GPU, not on a CPU."""
        super().__init__(checkpoint, options, detokenize=detokenize, overlap=overlap)
        self.trial = Trial(self.devices)
        started = time.perf_counter()
        with current(checkpoint.device):
            if checkpoint.device.type == "cuda":
                self._prepare_gpu()
            else:
                self._prepare_cpu()
        self.warm_up_s = time.perf_counter() - started
        self.warm_up_graphs = self.runner.graphs.captured if self.runner.graphs else []

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "native",
            "model": self.checkpoint.name,
            "device": str(self.checkpoint.device),
            "gpu": gpu_name(self.checkpoint.device),
            "devices": len(self.devices),
            "dtype": str(self.checkpoint.dtype).removeprefix("torch."),
            "dtype_reason": self.checkpoint.dtype_reason,
            "matmul_dtype": str(self.runner.text.lm_head.matmul_dtype).removeprefix("torch."),
            "attention": self.runner.attention.name,
            "vision_attention": self.runner.attention.vision_name,
            "prefill_attention": self.runner.attention.prefill_name,
            "attention_ms": self.runner.attention.kernel_ms,
            "kernels": self.text.kernels.name,
            "cuda_graphs": self.runner.graphs is not None,
            "replaced": self.trial.replaced,
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

    # ---- before the first row

    def _prepare_cpu(self) -> None:
        """Choose attention and kernels by trial, for a cache of a size that is set."""
        attention = self._choose_attention(use=lambda one: None)
        self._choose_kernels(use=self.set_kernels)
        layers = Counter(self.checkpoint.layer_devices)
        share = self.options.cache_gb * 1e9 / layers.total()
        self.assemble(attention, {each: share * n for each, n in layers.items()}, setting="engine.cache_gb")

    def _choose_attention(self, use: Callable[[AttentionBackend], None]) -> AttentionBackend:
        widths, device, dtype = self.widths(), self.checkpoint.device, self.checkpoint.dtype
        return self.trial.choose(
            "attention",
            self.attention_candidates,
            results=lambda one: run_every_shape(one, widths, device, dtype),
            use=use,
            forced=self.options.attention != "auto",
            not_its_fault=is_out_of_memory,
        )

    def _choose_kernels(self, use: Callable[[EagerKernels], None]) -> None:
        widths, device, dtype = self.widths(), self.checkpoint.device, self.checkpoint.dtype
        self.trial.choose(
            "kernels",
            kernel_candidates(self.options.kernels, device, dtype),
            results=lambda one: list(run_every_operation(one, widths, device, dtype).values()),
            use=use,
            not_its_fault=is_out_of_memory,
        )

    def _prepare_gpu(self) -> None:
        """Choose the parts by trial, size the cache by what the largest pass leaves, and capture graphs."""
        device = self.checkpoint.device
        torch.cuda.empty_cache()  # of the weights that loading held twice
        try:
            attention = self._choose_attention(use=self._use_attention)
            self._choose_kernels(use=lambda one: self._use_kernels(one, attention))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"{device} has too little memory for the weights and one pass of {self.max_batch_tokens} tokens and "
                f"{self.max_batch_patches} patches; lower engine.max_batch_tokens or use more GPUs: {first_line(error)}"
            ) from error
        self._free_cache()
        self.assemble(attention, {each: self._bytes_for_cache(each) for each in self.devices})
        self._choose_graphs()
        self.runner.reset_counts()

    def _use_attention(self, attention: AttentionBackend) -> None:
        text, vision = self.text, self.vision
        choose_vision(
            attention,
            max_patches=self.max_batch_patches,
            num_heads=vision.num_heads,
            head_dim=vision.head_dim,
            dtype=self.checkpoint.dtype,
            device=vision.device,
        )
        choose_prefill(
            attention,
            max_tokens=self.max_batch_tokens,
            num_heads=text.num_heads,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            dtype=self.checkpoint.dtype,
            device=self.checkpoint.device,
        )
        self._try_passes(attention)

    def _use_kernels(self, kernels: EagerKernels, attention: AttentionBackend) -> None:
        if kernels is not self.text.kernels:
            self.set_kernels(kernels)
            self._try_passes(attention)

    def _try_passes(self, attention: AttentionBackend) -> None:
        """Answer one row, then rows that fill a prefill pass, and note how much memory that takes without the cache.

        A pass that does not fit the memory lowers the engine's budgets until one does.
        """
        while True:
            requests = full_pass(
                self.checkpoint.image_token_id,
                self.checkpoint.architecture.patch_size,
                max_tokens=self.max_batch_tokens,
                max_patches=self.max_batch_patches,
                max_length=self.max_context,
            )
            # Admission keeps a block for each sequence besides its prompt.
            block_size = attention.block_size
            room = sum(-(-len(request.input_ids) // block_size) + 1 for request in requests)
            self._free_cache()
            self.assemble(attention, None, num_tokens=max(room * block_size, MAX_VISUAL_TOKENS + 3))
            for device in self.devices:
                torch.cuda.reset_peak_memory_stats(device)
            self._answer([self._first_request()])
            self._answer(requests)
            self._sample_widest()
            self._peaks = {
                device: torch.cuda.max_memory_allocated(device) - self.cache.storage_bytes(device)
                for device in self.devices
            }
            if not self._num_out_of_memory:
                return
            budgets = self.scheduler.batch_tokens.value, self.scheduler.batch_patches.value
            log.warning(
                "a pass of %d tokens does not fit this GPU's memory; trying %d", self.max_batch_tokens, budgets[0]
            )
            self.max_batch_tokens, self.max_batch_patches = budgets

    def _free_cache(self) -> None:
        """Give back the memory of an earlier trial, which would count into what a pass takes."""
        for name in ("cache", "runner"):
            self.__dict__.pop(name, None)
        gc.collect()
        torch.cuda.empty_cache()

    def _first_request(self) -> Request:
        max_length = min(self.max_context, self.cache.num_tokens)
        return first_request(
            self.checkpoint.image_token_id, self.checkpoint.architecture.patch_size, max_length=max_length
        )

    def _answer(self, requests: Sequence[Request]) -> None:
        try:
            for completion in self.generate(requests):
                if completion.error is not None:
                    raise completion.error
        finally:  # after a failure nothing is left of them
            for request in requests:
                self.abort(request.request_id)

    @torch.inference_mode()
    def _sample_widest(self) -> None:
        """Sample a full decode batch in the way that takes the most memory."""
        drawn, head = SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, logprobs=True), self.text.lm_head
        # Beside a greedy row, the others' scores are copied.
        rows = sample_rows([SamplingParams(), *[drawn] * (self.options.max_running or MOST_RUNNING)])
        sample(torch.zeros(len(rows), head.out_features, dtype=self.text.dtype, device=head.device), rows)

    def _bytes_for_cache(self, device: torch.device) -> int:
        free, total = torch.cuda.mem_get_info(device)
        return bytes_for_cache(
            total=total,
            free=free,
            allocated=torch.cuda.memory_allocated(device),
            peak=self._peaks[device],
            share=self.options.gpu_memory_fraction * self.options.gpu_share,
        )

    def _choose_graphs(self) -> None:
        wanted, runner = self.options.cuda_graphs, self.runner
        can = runner.attention.allows_graphs and len(self.devices) == 1
        if wanted and not can:
            raise CheckpointError(
                f"engine.cuda_graphs is true, but {runner.attention.name} attention over {len(self.devices)} GPU(s) "
                "can't be captured; leave it unset"
            )

        def graphs() -> DecodeGraphs:
            return DecodeGraphs(
                runner.decode_forward,
                runner.last_tokens,
                max_running=self.scheduler.max_running,
                max_width=self.scheduler.blocks.blocks_for(self.max_context),
                scrap_slot=self.cache.scrap_slot,
            )

        none: Candidate[DecodeGraphs | None] = Candidate("false", lambda: None)
        self.trial.choose(
            "cuda_graphs",
            [Candidate("true", graphs), none] if can and wanted is not False else [none],
            results=self._decode_results,
            use=self._use_graphs,
            forced=bool(wanted),
            tolerance=4.0,  # a whole model's rounding
        )

    @torch.inference_mode()
    def _decode_results(self, graphs: DecodeGraphs | None) -> list[torch.Tensor]:
        """Logits of two decode passes in which every row and pass is different, so that none can stand for another.
        Three rows: a graph has more, and fills them up."""
        self.runner.graphs = graphs
        num_rows = min(3, self.scheduler.max_running, self.cache.num_blocks)
        rows = np.arange(num_rows)
        results = []
        for length in (2, 5):
            tokens = torch.arange(num_rows, device=self.runner.last_tokens.device) * 37 + length
            self.runner.last_tokens[:num_rows] = tokens % self.text.lm_head.out_features
            lengths, blocks = rows % 2 + length - 1, rows[::-1].copy()
            slots = blocks * self.cache.block_size + lengths - 1
            numbers = np.stack([rows, lengths - 1, slots, lengths])
            logits = self.runner.decode_rows(numbers, blocks.astype(np.int32)[:, None])
            results.append(logits.clone())
        return results

    def _use_graphs(self, graphs: DecodeGraphs | None) -> None:
        self.runner.graphs = graphs
        if graphs is not None:
            with torch.inference_mode():
                capture_largest_first(set(graphs.sizes) - set(graphs.captured), graphs.capture)
        self._answer([self._first_request()])
