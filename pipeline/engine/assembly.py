"""From a checkpoint and options to everything that a step needs: models, cache, scheduler, runner.

Knows what depends on the attention backend and on the size of the cache, and builds it as often as it is asked. Which
backend and which size is engine.py's; the steps are loop.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.engine.attention.choose import attention_candidates
from pipeline.engine.attention.interface import AttentionBackend
from pipeline.engine.interface import Detokenize
from pipeline.engine.kernels.eager import EagerKernels
from pipeline.engine.kernels.sample import Widths
from pipeline.engine.kv_cache import KVCache, fitting_blocks
from pipeline.engine.loop import EngineLoop
from pipeline.engine.model_runner import ModelRunner
from pipeline.engine.models.text_model import TextModel
from pipeline.engine.models.vision import VisionModel
from pipeline.engine.pixels import PixelTable
from pipeline.engine.scheduling.admission import AdmissionRules
from pipeline.engine.scheduling.block_manager import BlockManager
from pipeline.engine.scheduling.encoded_media import EncodedMedia
from pipeline.engine.scheduling.scheduler import DEFAULT_RUNNING, LONG, SHORT, Scheduler, pick_max_running
from pipeline.engine.scheduling.stopping import StopRules
from pipeline.engine.settings import EngineOptions
from pipeline.engine.shard import ShardedAttention
from pipeline.engine.trial import Candidate
from pipeline.engine.weights import Checkpoint

MAX_KEPT_VISUAL_TOKENS = 2**17
"""Visual tokens kept for waiting sequences that share media; above it the oldest are encoded again."""


class AssembledEngine(EngineLoop):
    """The models of a checkpoint, and the rest of an engine around them once `assemble` was called."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: EngineOptions,
        *,
        detokenize: Detokenize | None,
        overlap: bool | None,
    ) -> None:
        device, dtype = checkpoint.device, checkpoint.dtype
        on_gpu = device.type == "cuda"
        rules = StopRules(checkpoint.eos_token_ids, detokenize)
        super().__init__(checkpoint, rules, max_lag=int(on_gpu if overlap is None else overlap))
        self.options = options
        self.max_context = min(options.max_context or checkpoint.max_context, checkpoint.max_context)
        self.max_batch_tokens = options.max_batch_tokens or (16384 if on_gpu else 2048)
        self.max_batch_patches = options.max_batch_patches or 4 * self.max_batch_tokens
        self.attention_candidates = self._attention_candidates()
        with torch.no_grad():
            self.text = TextModel(checkpoint.model, checkpoint.architecture, release=checkpoint.is_owned)
            pixels = PixelTable(options, device=device, dtype=dtype)
            make_vision = checkpoint.architecture.vision
            self.vision: VisionModel = make_vision(
                checkpoint.model, self.attention_candidates[-1].load(), pixels, release=checkpoint.is_owned
            )
        self.devices = tuple(dict.fromkeys((device, *checkpoint.layer_devices)))

    def _attention_candidates(self) -> Sequence[Candidate[AttentionBackend]]:
        checkpoint = self.checkpoint
        candidates = attention_candidates(self.options.attention, checkpoint.device, checkpoint.dtype)
        devices = set(checkpoint.layer_devices)
        if len(devices) == 1:
            return candidates

        def spread(one: Candidate[AttentionBackend]) -> Candidate[AttentionBackend]:
            return Candidate(
                one.name, lambda: ShardedAttention({each: one.load() for each in devices}, vision=one.load())
            )

        return [spread(one) for one in candidates]

    def assemble(
        self,
        attention: AttentionBackend,
        memory: Mapping[torch.device, float] | None,
        *,
        setting: str = "engine.gpu_memory_fraction",
        num_tokens: int = 0,
    ) -> None:
        """Build what depends on the attention backend and on the size of the cache: as much as this memory of each
        device holds, or just these tokens. The setting decides about the memory."""
        checkpoint, text = self.checkpoint, self.text
        self.vision.attention = attention
        sizes: dict[str, Any] = {
            "block_size": attention.block_size,
            "num_kv_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "dtype": text.dtype,
        }
        if memory is None:
            num_blocks = -(-num_tokens // attention.block_size)
        else:
            num_blocks = fitting_blocks(memory, checkpoint.layer_devices, setting=setting, **sizes)
        max_running = self.options.max_running or (
            pick_max_running(num_blocks * attention.block_size) if checkpoint.device.type == "cuda" else DEFAULT_RUNNING
        )
        num_blocks = min(num_blocks, max_running * -(-self.max_context // attention.block_size))
        self.cache = KVCache(checkpoint.layer_devices, num_blocks=num_blocks, **sizes)
        media = EncodedMedia(MAX_KEPT_VISUAL_TOKENS // (1 + self.vision.num_deep))
        scheduler = Scheduler(
            BlockManager(self.cache.num_blocks, self.cache.block_size),
            media,
            max_running=max_running,
            max_batch_tokens=self.max_batch_tokens,
            max_batch_patches=self.max_batch_patches,
            patience=LONG if checkpoint.device.type == "cuda" else SHORT,
        )
        runner = ModelRunner(
            text,
            self.vision,
            attention,
            self.cache,
            media,
            self.rules,
            device=checkpoint.device,
            max_running=max_running,
            max_context=self.max_context,
        )
        admission = AdmissionRules(
            checkpoint.vocab_size,
            checkpoint.image_token_id,
            checkpoint.video_token_id,
            self.max_context,
            cache_tokens=self.cache.num_tokens,
            can_detokenize=self.rules.detokenize is not None,
            positions=checkpoint.architecture.positions(checkpoint.model.config),
            patch_size=checkpoint.architecture.patch_size,
        )
        self.begin(scheduler, runner, media, admission)

    def set_kernels(self, kernels: EagerKernels) -> None:
        self.text.kernels = self.vision.kernels = kernels

    def widths(self) -> Widths:
        text, vision = self.text, self.vision
        return Widths(
            hidden=text.embed_weight.shape[1],
            heads=text.num_heads,
            kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            mlp=text.layers[0].mlp.width,
            vision_heads=vision.num_heads,
            vision_head_dim=vision.head_dim,
            vision_mlp=vision.mlp_width,
        )
