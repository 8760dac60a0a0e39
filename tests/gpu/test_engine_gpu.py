"""The parts of the engine that only a GPU runs: flash backends, CUDA graphs, overlap, bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from pipeline.engine import EngineOptions, SamplingParams
from pipeline.engine.attention.choose import attention_candidates, flash_attn_installed, torch_varlen_available
from pipeline.engine.attention.interface import AttentionBackend, DecodeInfo, PrefillInfo
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.cuda_graph import graph_sizes
from pipeline.engine.engine import NativeEngine
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.models.registry import ARCHITECTURES
from pipeline.engine.reference import ReferenceEngine
from pipeline.engine.weights import from_model
from tests.unit.engine.rounding import assert_rounding_explains, smallest_margin
from tests.unit.engine.tiny import make_config, make_model, mixed_requests, tokens_of

pytestmark = pytest.mark.gpu

BACKENDS = [
    pytest.param("flash", marks=pytest.mark.skipif(not flash_attn_installed(), reason="flash-attn is not installed")),
    pytest.param(
        "torch", marks=pytest.mark.skipif(not torch_varlen_available(), reason="no varlen kernels or no triton")
    ),
]
CLOSE = {"rtol": 2e-2, "atol": 2e-2}
Models = Callable[[str], tuple[Any, Any]]


def backend_of(name: str) -> AttentionBackend:
    return attention_candidates(name, torch.device("cuda"), torch.bfloat16)[0].load()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def make_cache(block_size: int, head_dim: int) -> KVCache:
    cache = KVCache(
        [torch.device("cuda")],
        num_blocks=64,
        block_size=block_size,
        num_kv_heads=2,
        head_dim=head_dim,
        dtype=torch.bfloat16,
    )
    cache.storage[torch.device("cuda")].normal_()
    return cache


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
def test_vision_equals_sdpa(name: str, head_dim: int) -> None:
    frames = [300, 300, 17, 64]
    q, k, v = (random(sum(frames), 4, head_dim) for _ in range(3))
    results = []
    for backend in (backend_of(name), SdpaAttention()):
        backend.begin_vision(frames, q.device)
        results.append(backend.vision(q, k, v))
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("name", BACKENDS)
def test_prefill_with_a_past_equals_sdpa(name: str) -> None:
    backend = backend_of(name)
    cache = make_cache(backend.block_size, 128)
    size = backend.block_size
    lengths, starts, tables = [40, 33, 7], [0, size + 5, 0], [[3], [9, 1, 7], [4]]
    slots = torch.cat(
        [
            torch.tensor([t[i // size] * size + i % size for i in range(s, s + n)])
            for t, s, n in zip(tables, starts, lengths, strict=True)
        ]
    ).cuda()
    q, k, v = random(80, 12, 128), random(80, 2, 128), random(80, 2, 128)
    cache.write(0, k, v, slots)
    results = []
    for each in (backend, SdpaAttention()):
        each.begin_prefill(PrefillInfo(lengths, starts, tables, slots), cache)
        results.append(each.prefill(q, k, v, cache, 0))
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("group", [1, 6, 7])
def test_decode_equals_sdpa(name: str, group: int) -> None:
    backend = backend_of(name)
    cache = make_cache(backend.block_size, 128)
    lengths = [1, backend.block_size, 2 * backend.block_size + 3, 7]
    tables = torch.tensor([[5, 0, 0], [2, 0, 0], [9, 8, 30], [40, 0, 0]], dtype=torch.int32, device="cuda")
    q = random(4, 2 * group, 128)
    info = DecodeInfo(
        torch.zeros(4, device="cuda").long(), torch.tensor(lengths, dtype=torch.int32).cuda(), tables, lengths
    )
    results = []
    for each in (backend, SdpaAttention()):
        each.begin_decode(info, cache)
        results.append(each.decode(q, cache, 0))
    torch.testing.assert_close(*results, **CLOSE)


def half(family: str) -> Any:
    # An MLP of a width that is not aligned, as that of the published towers.
    changes = {"vision_config": {"intermediate_size": 108}} if family == "qwen2_5_vl" else {}
    return make_model(config=make_config(family, **changes), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def models() -> Models:
    """Of a family: a model in bfloat16, and one in float32 with the same weights."""

    @cache
    def pair(family: str) -> tuple[Any, Any]:
        rounded = half(family)
        exact = make_model(config=rounded.config)
        exact.load_state_dict({name: tensor.float() for name, tensor in rounded.state_dict().items()})
        return rounded.cuda(), exact.cuda()

    return pair


def engine(model: Any, **options: Any) -> NativeEngine:
    return NativeEngine(from_model(model), EngineOptions("tiny", **{"gpu_memory_fraction": 0.05, **options}))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_float32_on_the_gpu_gives_the_tokens_of_the_cpu(family: str) -> None:
    model = make_model(config=make_config(family))
    # Without near-ties, where sums in another order may rightly choose otherwise.
    requests = [row for row in mixed_requests(24, seed=2, family=family) if smallest_margin(model, row) > 1e-3]
    expected = tokens_of(ReferenceEngine(from_model(model), EngineOptions("tiny")).generate(requests))
    assert len(requests) > 18
    assert tokens_of(engine(model.cuda(), attention="sdpa").generate(requests)) == expected


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("name", BACKENDS)
def test_bfloat16_parts_from_transformers_only_at_near_ties(models: Models, family: str, name: str) -> None:
    rounded, exact = models(family)
    requests = mixed_requests(30, seed=7, family=family)
    reference = ReferenceEngine(from_model(rounded), EngineOptions("tiny", batch_size=1, attention="sdpa"))
    theirs = tokens_of(reference.generate(requests))
    ours = tokens_of(engine(rounded, attention=name).generate(requests))
    for request, mine, other in zip(requests, ours, theirs, strict=True):
        assert_rounding_explains(request, mine, other, rounded, exact)


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("name", BACKENDS)
def test_graphs_give_the_tokens_of_eager_decoding(models: Models, family: str, name: str) -> None:
    rounded, exact = models(family)
    requests = mixed_requests(30, seed=3, family=family)
    replayed = engine(rounded, attention=name)
    assert replayed.runner.graphs is not None
    eager = tokens_of(engine(rounded, attention=name, cuda_graphs=False).generate(requests))
    graphed = tokens_of(replayed.generate(requests))
    assert replayed.runner.graphs._graphs
    for request, mine, other in zip(requests, graphed, eager, strict=True):
        # Padding rows may change a product's tiling, so near-ties may part here too.
        assert_rounding_explains(request, mine, other, rounded, exact)


@pytest.mark.parametrize("name", BACKENDS)
def test_warm_up_captures_the_graphs_in_seconds_and_leaves_none_to_the_run(models: Models, name: str) -> None:
    warm = engine(models("qwen2_vl")[0], attention=name)
    described = warm.describe()
    assert sorted(described["warm_up_graphs"]) == graph_sizes(warm.scheduler.max_running)
    assert 0 < described["warm_up_s"] < 60
    warm.generate(mixed_requests(30, seed=3))
    assert warm.stats()["graphs"] == len(described["warm_up_graphs"])


@pytest.mark.parametrize("name", BACKENDS)
def test_an_engine_on_the_second_gpu_gives_the_tokens_of_the_first(models: Models, name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs: run `make test-gpu` on a machine that has them")
    rounded, exact = models("qwen2_vl")
    requests = mixed_requests(40, seed=3)
    first = tokens_of(engine(rounded, attention=name).generate(requests))
    second = tokens_of(engine(half("qwen2_vl").to("cuda:1"), attention=name).generate(requests))
    for request, mine, other in zip(requests, second, first, strict=True):
        assert_rounding_explains(request, mine, other, rounded, exact)


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("name", BACKENDS)
def test_no_pass_waits_for_the_device_whatever_the_sampling(
    models: Models, family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and media in several passes; tokens are read between the passes, where waiting is allowed."""
    busy = engine(models(family)[0], attention=name, max_batch_tokens=48, max_batch_patches=64, max_running=12)
    run = busy.runner.run

    def watched(plan: Any, **options: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(plan, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(busy.runner, "run", watched)
    samplings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.7, "min_p": 0.05, "n": 2},
        {"min_tokens": 4, "stop_token_ids": (17,), "logprobs": True},
        {"repetition_penalty": 1.3, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    ]
    requests = [
        replace(request, sampling=SamplingParams(max_tokens=8, seed=1, **samplings[i % 4]))
        for i, request in enumerate(mixed_requests(24, seed=6, family=family))
    ]
    assert all(completion.error is None for completion in busy.generate(requests))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_decode_pass_never_waits_for_the_device(models: Models, name: str) -> None:
    warm = engine(models("qwen2_vl")[0], attention=name)
    requests = mixed_requests(8, seed=5)
    warm.generate(requests)
    for request in requests:
        warm.add(request)
    warm.step()
    plan = warm.scheduler.schedule()
    assert plan is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = warm.runner.run(plan, max_batch_patches=1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    warm._in_flight.append(result)
    while warm.has_unfinished():
        warm.step()
