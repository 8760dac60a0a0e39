"""A model over several devices: even shares, nothing that mixes devices, and the same tokens as on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pipeline.engine import EngineOptions, SamplingParams
from pipeline.engine.dense import Dense
from pipeline.engine.engine import NativeEngine
from pipeline.engine.shard import device_map, split_layers
from pipeline.engine.weights import from_model, load_checkpoint
from pipeline.errors import CheckpointError
from tests.unit.engine.tiny import make_config, make_model, mixed_requests, tokens_of


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are packed on a CPU alone."""
    monkeypatch.setattr("pipeline.engine.dense.can_pack", lambda dtype: False)


@given(st.integers(1, 100), st.integers(0, 500), st.integers(0, 300), st.integers(1, 90), st.integers(1, 8))
def test_layers_are_laid_out_in_runs_of_even_size(layer: int, first: int, last: int, layers: int, devices: int) -> None:
    places = split_layers(layer, first, last, layers, devices)
    assert len(places) == layers
    assert places == sorted(places)
    assert places[0] >= 0
    assert places[-1] < devices
    held = [places.count(device) * layer for device in range(devices)]
    held[0] += first
    held[-1] += last
    share = (first + layers * layer + last) / devices
    assert max(held) <= max(share + layer, first + layer, last + layer)


def test_a_72b_fits_four_devices_in_like_shares() -> None:
    config = make_config()
    text = {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64}
    for name, value in {**text, "num_key_value_heads": 8, "vocab_size": 152064}.items():
        setattr(config.text_config, name, value)
    for name, value in {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4}.items():
        setattr(config.vision_config, name, value)
    config.tie_word_embeddings = False
    devices = [torch.device("cuda", index) for index in range(4)]
    places = device_map(config, devices)
    layers = [sum(".layers." in name and place == device for name, place in places.items()) for device in devices]
    assert sum(layers) == 80
    assert all(17 <= count <= 23 for count in layers), layers
    assert places["model.visual"] == devices[0]
    assert places["lm_head"] == places["model.language_model.norm"] == devices[3]


def test_the_map_names_every_weight_once(tiny_model: Any) -> None:
    places = device_map(tiny_model.config, [torch.device("cuda", 0), torch.device("cuda", 1)])
    for name, _ in tiny_model.named_parameters():
        owners = [prefix for prefix in places if name == prefix or name.startswith(f"{prefix}.")]
        assert len(owners) == 1, (name, owners)
    assert places["lm_head"] == places["model.language_model.embed_tokens"]  # tied


class TwoDevices(TorchFunctionMode):
    """Lets tensors of the CPU say that they lie on `FIRST` or `SECOND`, and refuses what would mix the two."""

    def __init__(self) -> None:
        super().__init__()
        self._on_second = WeakIdKeyDictionary()
        self.crossings = 0

    def where(self, tensor: torch.Tensor) -> torch.device:
        return SECOND if tensor in self._on_second else FIRST

    def put(self, *tensors: torch.Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                self._on_second[tensor] = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:  # another object each time, but equal
            return self.where(args[0])
        found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        places = {self.where(tensor) for tensor in found if tensor.dim() > 0}
        target = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)), None)
        if func is torch.Tensor.to and target is not None:
            moved = args[0].clone()  # a move gives another tensor
            self.crossings += self.where(args[0]) != target
            if target == SECOND:
                self.put(moved)
            return moved
        assert len(places) < 2, f"{func.__name__} mixes devices"
        out = func(*args, **kwargs)
        if SECOND in places or (not found and target == SECOND):
            self.put(*(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)))
        return out


FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 0)
"""One device to torch, two to whoever compares them."""


def sharded_engine(model: Any, options: EngineOptions, devices: TwoDevices) -> NativeEngine:
    """The first layer on the first device, the others, the last norm and the head on the second."""
    engine = NativeEngine(replace(from_model(model), layer_devices=(FIRST, SECOND, SECOND)), options)
    text = engine.runner.text
    for layer in text.layers[1:]:
        devices.put(layer.input_norm, layer.post_norm)
        for product in (layer.qkv, layer.out, layer.mlp.gate_up, layer.mlp.down):
            devices.put(product._weight, product._bias)
    text.lm_head = Dense(model.lm_head.weight.clone(), None)
    devices.put(text.final_norm, text.lm_head._weight)
    devices.put(*engine.cache.keys[1:], *engine.cache.values[1:])
    return engine


def test_two_devices_give_the_tokens_of_one_and_no_operation_mixes_them() -> None:
    model = make_model(seed=3)
    requests = mixed_requests(12, seed=5)
    several = SamplingParams(max_tokens=9, n=3, temperature=0.7, seed=1, logprobs=True)
    requests[0] = replace(requests[0], sampling=several)
    # Prompts in several passes, and torch's operations alone: code of our own does not say on which device it works.
    small = EngineOptions("", cache_gb=0.01, max_batch_tokens=64, attention="sdpa", kernels="eager")
    expected = NativeEngine(from_model(model), small).generate(requests)
    devices = TwoDevices()
    engine = sharded_engine(make_model(seed=3), small, devices)
    assert {device: storage.shape[1] for device, storage in engine.cache.storage.items()} == {FIRST: 1, SECOND: 2}
    assert engine.describe()["devices"] == 2
    with devices:
        found = engine.generate(requests)
    assert tokens_of(found) == tokens_of(expected)
    assert devices.crossings > 100


def test_the_pretended_devices_refuse_a_product_of_both() -> None:
    devices = TwoDevices()
    with devices:
        here = torch.ones(2, 2)
        there = here.to(SECOND)
        assert (here.device, there.device, (there @ there).device) == (FIRST, SECOND, SECOND)
        with pytest.raises(AssertionError, match="matmul mixes devices"):
            here @ there


def test_more_devices_than_there_are_is_one_line(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model.save_pretrained(tmp_path)
    options = EngineOptions(str(tmp_path), num_devices=4, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(CheckpointError, match="spread over 4 GPUs, but torch sees 2 here"):
        load_checkpoint(options)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"accelerate package, which is missing; install it with pip install"):
        load_checkpoint(options)


def test_on_a_cpu_the_number_of_devices_means_nothing(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    assert len(set(load_checkpoint(EngineOptions(str(tmp_path), num_devices=4, device="cpu")).layer_devices)) == 1
