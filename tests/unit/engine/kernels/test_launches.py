"""How many launches a layer takes, counted in passes of the whole engine on a pretended GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.engine import EngineOptions
from pipeline.engine.attention.packed import PackedAttention, Packing
from pipeline.engine.engine import NativeEngine
from pipeline.engine.kernels.eager import EAGER, EagerKernels
from pipeline.engine.kernels.fused import FusedKernels
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.weights import from_model
from tests.unit.engine.pretended_gpu import OnGpu, pretended_gpu, put_model
from tests.unit.engine.tiny import make_model, mixed_requests


class Counter(TorchDispatchMode):
    """Counts what would be a launch on a GPU: an operation that is neither a view nor an allocation."""

    launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += not (func.is_view or func.overloadpacket.__name__.startswith(("empty", "_reshape_alias")))
        return func(*args, **(kwargs or {}))


class OneLaunch(PackedAttention):
    """Attention as flash-attn does it: a launch for each layer."""

    name = "pretended"
    block_size = 16
    allows_graphs = False

    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Packing, keys: Packing, *, causal: bool
    ) -> torch.Tensor:
        return q.clone(memory_format=torch.contiguous_format)

    def decode(self, q: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        return q.clone(memory_format=torch.contiguous_format)


def interpreted(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """A launch of a real kernel: run by the interpreter, counted once."""
    torch.cuda.current_stream()  # which the pretended GPU refuses in a thread that is on another device
    plain = [each.as_subclass(torch.Tensor) if isinstance(each, OnGpu) else each for each in arguments]
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        kernel[grid](*plain, **constants)
    torch.zeros(1)  # an operation, which the counter sees


@contextmanager
def counted(counts: dict[str, int], name: str) -> Iterator[None]:
    with Counter() as counter:
        yield
    counts[name] = counter.launches


def launches(monkeypatch: pytest.MonkeyPatch, kernels: EagerKernels) -> dict[str, int]:
    """Of each kind of pass, by a model whose layers, vision and text, are `layers`."""
    monkeypatch.setattr("pipeline.engine.engine.pick_attention", lambda *_: OneLaunch())
    counts: dict[str, int] = {}
    engine = NativeEngine(from_model(put_model(make_model())), EngineOptions("tiny", kernels="eager", max_running=4))
    runner = engine.runner
    runner.text.kernels = runner.vision.kernels = kernels
    run_vision, run_text = runner.vision._run, runner.text.forward

    def vision(frames: Any) -> torch.Tensor:
        with counted(counts, "vision"):
            return run_vision(frames)

    def text(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        with counted(counts, "prefill" if "prefill" not in counts else "decode"):
            return run_text(hidden, *others)

    monkeypatch.setattr(runner.vision, "_run", vision)
    monkeypatch.setattr(runner.text, "forward", text)
    engine.generate([request for request in mixed_requests(8) if len(request.media) == 1][:1])
    return counts
