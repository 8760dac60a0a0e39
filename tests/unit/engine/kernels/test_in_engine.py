"""The fused kernels in an engine: the tokens are those of the eager ones, and a layer takes fewer launches."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from pipeline.engine import EngineOptions, Medium, SamplingParams
from pipeline.engine.attention.packed import PackedAttention, Packing
from pipeline.engine.engine import NativeEngine
from pipeline.engine.kernels.eager import EAGER
from pipeline.engine.kernels.fused import FusedKernels
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.weights import from_model
from tests.unit.engine.pretended_gpu import pretended_gpu, put_model
from tests.unit.engine.tiny import make_medium, make_model, make_request, tokens_of


def test_tokens_are_those_of_the_eager_kernels(tiny_model: Any) -> None:
    rng = np.random.default_rng(4)
    media = [make_medium(rng, "image", max_side=4), make_medium(rng, "video", max_side=2, max_steps=2)]
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    requests = [make_request(i, rng, media=media[i : i + 1], sampling=sampling, max_text=4) for i in range(2)]
    engine = NativeEngine(from_model(tiny_model), EngineOptions("tiny", kernels="eager"))
    expected = tokens_of(engine.generate(requests))
    engine.runner.vision.kernels = engine.runner.text.kernels = FusedKernels()
    assert tokens_of(engine.generate(requests)) == expected


class Counter(TorchDispatchMode):
    """Counts what a GPU would launch: operations that are neither views nor allocations, and Triton's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # `to` and `reshape` may be views, and may copy.
        is_view = func.is_view and _storage(out) in map(_storage, tree_leaves(args))
        self.launches += not (is_view or func.overloadpacket.__name__.startswith("empty"))
        return out

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Runs the kernel in the interpreter."""
        self.launches += 1
        plain = [x.as_subclass(torch.Tensor) if isinstance(x, torch.Tensor) else x for x in arguments]
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            kernel[grid](*plain, **constants)


def _storage(value: Any) -> int | None:
    first = value[0] if isinstance(value, (list, tuple)) else value
    return first.untyped_storage().data_ptr() if isinstance(first, torch.Tensor) else None


class OneLaunch(PackedAttention):
    """Attention takes one launch in each layer."""

    name = "pretended"
    block_size = 16
    allows_graphs = False

    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Packing, keys: Packing, causal: bool
    ) -> torch.Tensor:
        return q.clone(memory_format=torch.contiguous_format)

    def decode(self, q: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        return q.clone(memory_format=torch.contiguous_format)


def launches_of_a_layer(engine: NativeEngine, counter: Counter) -> dict[str, int]:
    """In a vision pass, a prefill and a decode: what a model of two layers takes more than one of one."""
    vision, text = engine.runner.vision, engine.runner.text
    counts: dict[str, list[int]] = {"vision": [], "prefill": [], "decode": []}

    def counted(run: Any, *names: str) -> Any:
        calls = itertools.cycle(names)

        def wrapped(*args: Any) -> Any:
            before = counter.launches
            with counter:
                out = run(*args)
            counts[next(calls)].append(counter.launches - before)
            return out

        return wrapped

    blocks, layers = vision.blocks, text.layers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "run", counted(vision.run, "vision"))
        patch.setattr(text, "forward", counted(text.forward, "prefill", "decode"))
        for num_layers in (1, 2):
            patch.setattr(vision, "blocks", blocks[:num_layers])
            patch.setattr(text, "layers", layers[:num_layers])
            medium = Medium("image", (1, 2, 2), np.full((4, 588), num_layers, dtype=np.uint8))
            sampling = SamplingParams(max_tokens=2, ignore_eos=True)
            engine.generate([make_request(0, np.random.default_rng(0), media=[medium], sampling=sampling, max_text=2)])
    return {name: two - one for name, (one, two) in counts.items()}


@pytest.mark.slow
def test_launches_of_a_layer_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter()
    with pretended_gpu(monkeypatch):
        options = EngineOptions("tiny", attention="sdpa", kernels="eager", cuda_graphs=False, max_running=4)
        engine = NativeEngine(from_model(put_model(make_model(dtype=torch.bfloat16))), options)
        engine.runner.attention = engine.runner.vision.attention = OneLaunch()
        found = {}
        for kernels in (EAGER, FusedKernels(counter.launch)):
            engine.runner.vision.kernels = engine.runner.text.kernels = kernels
            found[kernels.name] = launches_of_a_layer(engine, counter)
    assert found == {
        "eager": {"vision": 18, "prefill": 19, "decode": 19},
        "fused": {"vision": 9, "prefill": 9, "decode": 9},
    }
