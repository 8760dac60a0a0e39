"""One model over several GPUs of a machine: which layers lie where, and attention on each layer's own device.

    GPU 0                          GPU 1              GPU 2              GPU 3
    vision tower, embedding,       layers 19 .. 39    layers 40 .. 60    layers 61 .. 79, last norm, head
    layers 0 .. 18

A pass visits the devices one after another, so sharding adds memory and not speed: for a model that fits one GPU, one
engine per GPU is faster. Keys and values lie with their layer; hidden states move from device to device.
This has not run on several GPUs yet. The tests run it on simulated devices, which refuse operations that mix two, and
on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.engine.attention.interface import AttentionBackend, DecodeInfo, PrefillInfo
from pipeline.engine.device import current
from pipeline.engine.kv_cache import KVCache


def split_layers(layer: int, first: int, last: int, num_layers: int, num_devices: int) -> list[int]:
    """The device number of each layer, so that devices hold consecutive layers and about equal bytes.

    `layer` is the size of one layer; `first` lies on the first device besides its layers (vision tower, embedding),
    `last` on the last one (head).
    """
    total = first + num_layers * layer + last
    share = total / num_devices
    # With all bytes in a row and cut into equal shares, a layer goes where its middle falls.
    return [min(num_devices - 1, int((first + (index + 0.5) * layer) / share)) for index in range(num_layers)]


def device_map(config: Any, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """transformers' `device_map` for a model of this config."""
    text, vision = config.text_config, config.vision_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2 * text.hidden_size * head_dim * (text.num_attention_heads + text.num_key_value_heads)
    layer = attention + 3 * text.hidden_size * text.intermediate_size
    width = getattr(vision, "embed_dim", vision.hidden_size)
    wide = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
    tower = vision.depth * width * (4 * width + 2 * wide)
    embedding = text.vocab_size * text.hidden_size
    numbers = split_layers(layer, tower + embedding, embedding, text.num_hidden_layers, len(devices))
    first, last = devices[0], devices[-1]
    # A head that shares the embedding's weight has to lie where the embedding does.
    head = first if config.tie_word_embeddings else last
    return {
        "model.visual": first,
        "model.language_model.embed_tokens": first,
        "model.language_model.rotary_emb": first,
        **{f"model.language_model.layers.{index}": devices[number] for index, number in enumerate(numbers)},
        "model.language_model.norm": head,
        "lm_head": head,
    }


class ShardedAttention(AttentionBackend):
    """One backend per device behind a single interface; each prepares every pass on its own device."""

    def __init__(self, backends: Mapping[torch.device, AttentionBackend], vision: AttentionBackend) -> None:
        """`vision` serves the vision tower alone, because its device may hold layers too and a backend keeps the state
        of the pass that it has prepared."""
        self._backends = backends
        self._vision = vision
        self.name = vision.name
        self.block_size = vision.block_size

    @property
    def vision_name(self) -> str:
        return self._vision.vision_name

    @property
    def prefill_name(self) -> str:
        return self.for_prefill[0].prefill_name

    @property
    def kernel_ms(self) -> dict[str, dict[str, float]]:
        return {**self._vision.kernel_ms, **self.for_prefill[0].kernel_ms}

    @property
    def for_vision(self) -> AttentionBackend:
        return self._vision

    @property
    def for_prefill(self) -> Sequence[AttentionBackend]:
        return list(self._backends.values())

    def begin_vision(self, frame_lengths: Sequence[int], device: torch.device) -> None:
        self._vision.begin_vision(frame_lengths, device)

    def vision(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self._vision.vision(q, k, v)

    def begin_prefill(self, info: PrefillInfo, cache: KVCache) -> None:
        for device, backend in self._backends.items():
            with current(device):
                backend.begin_prefill(replace(info, slots=info.slots.to(device)), cache)

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        with current(q.device):
            return self._backends[q.device].prefill(q, k, v, cache, layer)

    def begin_decode(self, info: DecodeInfo, cache: KVCache) -> None:
        for device, backend in self._backends.items():
            slots, lengths, tables = (part.to(device) for part in (info.slots, info.lengths, info.tables))
            with current(device):
                backend.begin_decode(DecodeInfo(slots, lengths, tables, info.host_lengths), cache)

    def decode(self, q: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        with current(q.device):
            return self._backends[q.device].decode(q, cache, layer)
