"""The engine's whole way on a GPU, on one that is pretended: no pass waits, graphs replay, cuda:1 is cuda:1."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine import EngineOptions, Request, SamplingParams
from pipeline.engine.attention.interface import AttentionBackend
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.device import upload
from pipeline.engine.engine import NativeEngine
from pipeline.engine.scheduling.scheduler import LONG
from pipeline.engine.trial import Candidate
from pipeline.engine.weights import from_model
from tests.unit.engine.pretended_gpu import GPU, HostWaits, PretendedFlash, PretendedGpu, pretended_gpu, put_model
from tests.unit.engine.tiny import make_config, make_model, mixed_requests, tokens_of

BUDGETS: dict[str, Any] = {"max_batch_tokens": 48, "max_batch_patches": 64, "max_running": 12, "max_context": 256}
"""Prompts in several passes, media in several passes, rows that wait."""

SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 0.8, "min_p": 0.1, "n": 3},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "logprobs": True},
    {"min_tokens": 6, "stop_token_ids": (17, 18)},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.5, "frequency_penalty": -0.4, "n": 2},
    {"repetition_penalty": 0.8, "temperature": 0.5, "min_tokens": 3, "logprobs": True},
    {"logprobs": True, "ignore_eos": True},
    {"stop_on_repetition": True},
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    with pretended_gpu(monkeypatch) as pretended:
        yield pretended


def every_sampling(family: str = "qwen2_vl") -> list[Request]:
    requests = mixed_requests(3 * len(SAMPLINGS), seed=6, family=family)
    return [
        replace(request, sampling=SamplingParams(max_tokens=6 + i % 9, seed=i, **SAMPLINGS[i % len(SAMPLINGS)]))
        for i, request in enumerate(requests)
    ]


def make_engine(
    monkeypatch: pytest.MonkeyPatch,
    backend: type[AttentionBackend] = PretendedFlash,
    family: str = "qwen2_vl",
    **options: Any,
) -> NativeEngine:
    use_backends(monkeypatch, backend)
    checkpoint = from_model(put_model(make_model(config=make_config(family))))
    assert checkpoint.device == GPU
    return NativeEngine(checkpoint, EngineOptions("tiny", **{**BUDGETS, "kernels": "eager", **options}))


def use_backends(monkeypatch: pytest.MonkeyPatch, *backends: type[AttentionBackend]) -> None:
    """In place of those that need a GPU."""
    candidates = [Candidate(backend.name, backend) for backend in backends]
    monkeypatch.setattr("pipeline.engine.assembly.attention_candidates", lambda *_: candidates)


def run_watched(engine: NativeEngine, gpu: PretendedGpu, requests: list[Request]) -> list[tuple[int, ...]]:
    """Every step watched, from the schedule to the completions: `PassResult.read` is the one place that reads tokens,
    and it reads host copies that an event stands behind."""
    done = []
    for request in requests:
        engine.add(request)
    while engine.has_unfinished():
        with gpu.watched():
            done += engine.step()
    return tokens_of(sorted(done, key=lambda completion: (completion.request_id, completion.index)))


def steady(requests: list[Request], family: str = "qwen2_vl") -> tuple[list[Request], list[tuple[int, ...]]]:
    """Those whose answers on the CPU stay the same when all weights are shaken a little, far more than rounding does,
    with these answers: near-ties, where sums in another order may rightly choose otherwise, are out."""
    answers: list[dict[Any, tuple[tuple[int, ...], ...]]] = []
    for shake in range(5):
        model = make_model(config=make_config(family))
        torch.manual_seed(shake)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + (1e-4 * torch.randn_like(parameter) if shake else 0.0))
        mine: dict[Any, tuple[tuple[int, ...], ...]] = {}
        for completion in NativeEngine(from_model(model), EngineOptions("tiny")).generate(requests):
            mine[completion.request_id] = (*mine.get(completion.request_id, ()), completion.token_ids)
        answers.append(mine)
    first = answers[0]
    kept = [
        request
        for request in requests
        if all(each[request.request_id] == first[request.request_id] for each in answers)
    ]
    assert len(kept) > 0.7 * len(requests)
    return kept, [tokens for request in kept for tokens in first[request.request_id]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "backend", "graphs"),
    [
        ("qwen2_vl", PretendedFlash, True),
        ("qwen2_vl", PretendedFlash, False),
        ("qwen2_vl", SdpaAttention, True),
        ("qwen2_5_vl", PretendedFlash, True),
        ("qwen3_vl", PretendedFlash, True),
    ],
)
def test_no_step_waits_for_the_device_and_tokens_are_those_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu, family: str, backend: type[AttentionBackend], graphs: bool
) -> None:
    requests, expected = steady(every_sampling(family), family)
    engine = make_engine(monkeypatch, backend, family, cuda_graphs=None if graphs else False)
    assert engine.max_lag == 1
    assert (engine.runner.graphs is not None) == (graphs and backend is PretendedFlash)
    assert run_watched(engine, gpu, requests) == expected
    assert engine.stats()["prefill_tokens"] >= sum(len(request.input_ids) for request in requests)


def test_top_p_over_more_tokens_than_it_looks_at_first_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu
) -> None:
    flat = {"temperature": 3.0, "top_p": 0.9}
    requests = [
        replace(request, sampling=SamplingParams(max_tokens=6, seed=i, **flat))
        for i, request in enumerate(mixed_requests(8, seed=6))
    ]
    requests, expected = steady(requests)
    monkeypatch.setattr("pipeline.engine.sampler.MAX_BEST", 4)
    assert run_watched(make_engine(monkeypatch), gpu, requests) == expected


def test_rows_with_a_penalty_are_read_one_pass_late_as_others_are(
    monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu
) -> None:
    engine = make_engine(monkeypatch)
    sampling = SamplingParams(max_tokens=6, repetition_penalty=1.3, presence_penalty=1.5)
    engine.add(replace(mixed_requests(1)[0], sampling=sampling))
    for _ in range(4):
        engine.step()
        assert len(engine._in_flight) == 1


def test_warm_up_leaves_no_graph_to_the_run_and_no_trace_in_its_counts(
    monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu
) -> None:
    engine = make_engine(monkeypatch)
    described = engine.describe()
    assert described["warm_up_graphs"] == [4, 12, 8, 2, 1]  # the trial's own, then the largest first
    assert described["warm_up_s"] > 0
    assert engine.scheduler.patience is LONG
    stats = engine.stats()
    assert stats["graphs"] == 5
    assert all(stats[name] == 0 for name in ("passes", "patches", "prefill_tokens", "seconds_decode", "cache_use"))
    engine.generate(every_sampling())
    assert engine.stats()["graphs"] == 5
    assert engine.describe() == described


def test_a_graph_that_warm_up_had_no_time_for_is_captured_when_needed(
    monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu
) -> None:
    monkeypatch.setattr("pipeline.engine.engine.capture_largest_first", lambda sizes, capture: None)
    requests, expected = steady(mixed_requests(30, seed=9))
    engine = make_engine(monkeypatch)
    assert engine.describe()["warm_up_graphs"] == [4, 1]
    assert tokens_of(engine.generate(requests)) == expected
    assert engine.stats()["graphs"] > 1


def test_a_capture_that_is_refused_leaves_stream_and_allocator_as_they_were(
    monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu
) -> None:
    ended: list[object] = []

    @contextlib.contextmanager
    def refused(graph: object, *, pool: object, stream: object) -> Iterator[None]:
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    monkeypatch.setattr(torch.cuda, "set_stream", ended.append)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *each: ended.append(each), raising=False)
    engine = make_engine(monkeypatch)
    assert "previous error" in engine.describe()["replaced"]["cuda_graphs true"]
    stream, pool = ended
    assert stream is not None and pool == (GPU.index, (0, 1))


@pytest.mark.slow
def test_an_engine_on_the_second_gpu_works_there_in_whatever_thread_steps_it(
    monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu
) -> None:
    requests, expected = steady(mixed_requests(10, seed=2))
    engine = make_engine(monkeypatch)
    found: list[tuple[int, ...]] = []

    def work() -> None:
        with gpu:
            found.extend(tokens_of(engine.generate(requests)))
            assert gpu.chosen.index == 0  # as the thread had it before

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == expected


def test_work_outside_of_an_engine_would_go_to_the_first_gpu(gpu: PretendedGpu) -> None:
    """Guards the guard."""
    with pytest.raises(AssertionError, match="goes to cuda:0"):
        torch.cuda.Event().record()
    with pytest.raises(AssertionError, match="goes to cuda:0"):
        upload(np.arange(3), GPU)


WAITS: dict[str, Any] = {
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "truth": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x[0, 0]),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to(torch.device("cpu"), non_blocking=True),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask as index": lambda x: x[x > 0],
    "number for an index": lambda x: x.__setitem__((0, x[0].long()), 1.0),
    "number for a place": lambda x: x.__setitem__((0, 0), 1.0),
    "list as index": lambda x: x[[0, 1]],
    "repeats": lambda x: x[0].repeat_interleave(x[0].long()),
    "tensor of a list": lambda x: torch.tensor([1, 2], device=x.device),
    "pageable": lambda x: torch.arange(3).to(x.device, non_blocking=True),
    "pinned, waited for": lambda x: torch.arange(3).pin_memory().to(x.device),
    "pageable target": lambda x: torch.zeros(2, 2).copy_(x, non_blocking=True),
    "read too soon": lambda x: torch.zeros(2, 2, pin_memory=True).copy_(x, non_blocking=True).tolist(),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_refused(gpu: PretendedGpu, name: str) -> None:
    """Guards the guard."""
    x = torch.ones(2, 2, device=GPU)
    with torch.cuda.device(GPU), gpu.watched(), pytest.raises(HostWaits):
        WAITS[name](x)
