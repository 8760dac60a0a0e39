"""One model over several GPUs of a machine: which layers lie where, and attention on each layer's own device.

    GPU 0                          GPU 1              GPU 2              GPU 3
    vision tower, embedding,       layers 19 .. 39    layers 40 .. 60    layers 61 .. 79, last norm, head
    layers 0 .. 18

A pass goes through the devices one after another, so a shard's gain is room and not speed: for a model that fits one
GPU, one engine a GPU is faster. Keys and values lie with their layer; hidden states cross over between devices.
Nothing here has run on several GPUs yet: the tests run it on torch's pretended ones, which refuse whatever mixes
devices, and on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipeline.engine.attention.interface import AttentionBackend, DecodeInfo, PrefillInfo
from pipeline.engine.device import current
from pipeline.engine.kv_cache import KVCache


def split_layers(layer: int, first: int, last: int, num_layers: int, num_devices: int) -> list[int]:
    """The device of each layer: runs of layers, as even in bytes as they can be.

    `layer` is the size of one; `first` lies on the first device beside its layers (vision tower, embedding), `last`
    on the last one (head).
    """
    total = first + num_layers * layer + last
    share = total / num_devices
    # A layer goes where its middle falls when all bytes are laid out in a row and cut into equal shares.
    return [min(num_devices - 1, int((first + (index + 0.5) * layer) / share)) for index in range(num_layers)]


def device_map(config: Any, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """transformers' `device_map` for a Qwen2-VL of this config."""
    text, vision = config.text_config, config.vision_config
    head_dim = text.hidden_size // text.num_attention_heads
    attention = text.hidden_size * (2 * text.hidden_size + 2 * text.num_key_value_heads * head_dim)
    layer = attention + 3 * text.hidden_size * text.intermediate_size
    tower = vision.depth * vision.embed_dim**2 * (4 + 2 * int(vision.mlp_ratio))
    words = text.vocab_size * text.hidden_size
    places = split_layers(layer, tower + words, words, text.num_hidden_layers, len(devices))
    first, last = devices[0], devices[-1]
    # A head that is the embedding again has to lie where the embedding does.
    head = first if config.tie_word_embeddings else last
    return {
        "model.visual": first,
        "model.language_model.embed_tokens": first,
        "model.language_model.rotary_emb": first,
        **{f"model.language_model.layers.{index}": devices[place] for index, place in enumerate(places)},
        "model.language_model.norm": head,
        "lm_head": head,
    }


class ShardedCache(KVCache):
    """A key-value cache for each device, numbered as one: what a block is on one device it is on all. It has no
    `keys` and `values` of its own; attention is given the part of the layer's device."""

    def __init__(self, layer_devices: Sequence[torch.device], make: Callable[[torch.device, int], KVCache]) -> None:
        """`make` gives the cache of a device for a number of layers; all must have as many blocks."""
        counts = Counter(layer_devices)
        self.parts = {device: make(device, count) for device, count in counts.items()}
        seen: Counter[torch.device] = Counter()
        self.places: list[tuple[torch.device, int]] = []
        """Device of each layer, and its number among that device's."""
        for device in layer_devices:
            self.places.append((device, seen[device]))
            seen[device] += 1
        first = self.parts[layer_devices[0]]
        self.num_blocks, self.block_size, self.scrap_slot = first.num_blocks, first.block_size, first.scrap_slot
        self._slots: tuple[torch.Tensor, dict[torch.device, torch.Tensor]] | None = None

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Put keys and values [T, kv_heads, head_dim], on the layer's device, into slots [T], on any."""
        if self._slots is None or self._slots[0] is not slots:
            self._slots = (slots, {device: slots.to(device) for device in self.parts})
        device, place = self.places[layer]
        self.parts[device].write(place, keys, values, self._slots[1][device])

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        for part in self.parts.values():
            part.copy_blocks(copies)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts.values())


class ShardedAttention(AttentionBackend):
    """A backend for each device behind the face of one; what a pass prepares is prepared on each."""

    def __init__(self, backends: Mapping[torch.device, AttentionBackend], vision: AttentionBackend) -> None:
        """`vision` is the vision tower's own: its device may hold layers too, and their passes must not mix."""
        self._backends = backends
        self._vision = vision
        self.name = vision.name
        self.block_size = vision.block_size

    def begin_vision(self, frame_lengths: Sequence[int], device: torch.device) -> None:
        self._vision.begin_vision(frame_lengths, device)

    def vision(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self._vision.vision(q, k, v)

    def begin_prefill(self, info: PrefillInfo, cache: KVCache) -> None:
        for device, backend in self._backends.items():
            here = PrefillInfo(info.lengths, info.starts, info.tables, info.slots.to(device))
            with current(device):
                backend.begin_prefill(here, _sharded(cache).parts[device])

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        device, place = _sharded(cache).places[layer]
        with current(device):
            return self._backends[device].prefill(q, k, v, _sharded(cache).parts[device], place)

    def begin_decode(self, info: DecodeInfo, cache: KVCache) -> None:
        for device, backend in self._backends.items():
            here = DecodeInfo(info.slots.to(device), info.lengths.to(device), info.tables.to(device), info.host_lengths)
            with current(device):
                backend.begin_decode(here, _sharded(cache).parts[device])

    def decode(self, q: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        device, place = _sharded(cache).places[layer]
        with current(device):
            return self._backends[device].decode(q, _sharded(cache).parts[device], place)


def _sharded(cache: KVCache) -> ShardedCache:
    assert isinstance(cache, ShardedCache)
    return cache
