"""The parts of an engine on a GPU, chosen by trial on a pretended one, and the size of its cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.attention.sample import run_every_shape
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.cuda_graph import DecodeGraphs
from pipeline.engine.kernels.eager import EAGER, EagerKernels
from pipeline.engine.kernels.sample import Widths
from pipeline.engine.kv_cache import KVCache, bytes_for_cache
from pipeline.engine.model_runner import ModelRunner
from pipeline.engine.scheduling.scheduler import pick_max_running
from pipeline.engine.sequence import MERGE_SIZE
from pipeline.engine.trial import Candidate, _difference
from pipeline.engine.warm_up import full_pass
from pipeline.errors import CheckpointError
from tests.unit.engine.pretended_gpu import PretendedFlash, PretendedGpu, pretended_gpu
from tests.unit.engine.test_pretended_gpu import make_engine, use_backends
from tests.unit.engine.tiny import mixed_requests


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    with pretended_gpu(monkeypatch) as pretended:
        yield pretended


class Broken(PretendedFlash):
    """Imports and runs small inputs, and then meets something it was not built for."""

    name = "broken"

    def varlen(self, *args: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")


class Forgetful(PretendedFlash):
    """Leaves out the newest token of each decode row."""

    name = "forgetful"

    def decode(self, q: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        lengths = self._decode.lengths
        self._decode.lengths = (lengths - 1).clamp(min=1)
        out = super().decode(q, cache, layer)
        self._decode.lengths = lengths
        return out


@pytest.mark.parametrize(
    ("backend", "reason"), [(Broken, "RuntimeError: no kernel image"), (Forgetful, "other numbers than pretended")]
)
def test_an_attention_backend_that_fails_its_trial_is_replaced_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu, caplog: pytest.LogCaptureFixture, backend: Any, reason: str
) -> None:
    make = use_backends
    monkeypatch.setattr(
        "tests.unit.engine.test_pretended_gpu.use_backends", lambda patch, one: make(patch, backend, PretendedFlash)
    )
    with caplog.at_level(logging.WARNING):
        engine = make_engine(monkeypatch, cuda_graphs=False)
    assert [reason in message for message in caplog.messages] == [True]
    described = engine.describe()
    assert described["attention"] == "pretended"
    assert reason in described["replaced"][f"attention {backend.name}"]
    assert all(completion.error is None for completion in engine.generate(mixed_requests(3)))


def test_a_forced_backend_that_fails_its_trial_is_an_error(monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu) -> None:
    make = use_backends
    monkeypatch.setattr(
        "tests.unit.engine.test_pretended_gpu.use_backends", lambda patch, one: make(patch, Broken, PretendedFlash)
    )
    with pytest.raises(CheckpointError, match=r"engine.attention is 'broken', which does not work here: RuntimeError"):
        make_engine(monkeypatch, attention="flash")


@pytest.mark.slow
def test_graphs_that_can_not_be_captured_or_replay_the_wrong_pass_are_left_out_unless_forced(
    monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu
) -> None:
    def capture(graphs: DecodeGraphs, size: int) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with monkeypatch.context() as patch:
        patch.setattr(DecodeGraphs, "capture", capture)
        described = make_engine(monkeypatch).describe()
        assert (described["cuda_graphs"], described["warm_up_graphs"]) == (False, [])
        assert "not permitted" in described["replaced"]["cuda_graphs true"]
        with pytest.raises(CheckpointError, match=r"engine.cuda_graphs is 'true', which does not work here"):
            make_engine(monkeypatch, cuda_graphs=True)
    replay, first = DecodeGraphs.replay, []

    def stale(graphs: DecodeGraphs, *arrays: Any) -> torch.Tensor:
        first.append(replay(graphs, *arrays).clone())
        return first[0]

    monkeypatch.setattr(DecodeGraphs, "replay", stale)
    described = make_engine(monkeypatch).describe()
    assert "other numbers than false" in described["replaced"]["cuda_graphs true"]
    with pytest.raises(CheckpointError, match=r"engine.cuda_graphs is true, but sdpa attention"):
        make_engine(monkeypatch, SdpaAttention, cuda_graphs=True)


def test_graphs_that_exchange_rows_are_left_out(monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu) -> None:
    replay = DecodeGraphs.replay
    monkeypatch.setattr(DecodeGraphs, "replay", lambda graphs, *arrays: replay(graphs, *arrays).flip(0))
    assert "other numbers than false" in make_engine(monkeypatch).describe()["replaced"]["cuda_graphs true"]


class Fused(EagerKernels):
    name = "fused"


class Wrong(Fused):
    def silu_times_up(self, gate_up: torch.Tensor) -> torch.Tensor:
        return super().silu_times_up(gate_up) * 1.01


class FailsInAPass(Fused):
    def rotate_vision(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        if len(qkv) > 16:  # more rows than the trial's small inputs have
            raise RuntimeError("out of resource: shared memory")
        return super().rotate_vision(qkv, cos, sin)


@pytest.mark.parametrize(
    ("kernels", "runs", "reason"),
    [(Fused, "fused", None), (Wrong, "eager", "other numbers than eager"), (FailsInAPass, "eager", "shared memory")],
)
def test_kernels_run_where_they_pass_their_trial(
    monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu, kernels: type[Fused], runs: str, reason: str | None
) -> None:
    candidates = [Candidate("fused", kernels), Candidate("eager", lambda: EAGER)]
    monkeypatch.setattr("pipeline.engine.engine.kernel_candidates", lambda *_: candidates)
    engine = make_engine(monkeypatch, cuda_graphs=False)
    described = engine.describe()
    assert (described["kernels"], engine.vision.kernels.name) == (runs, runs)
    assert (reason is None) == (described["replaced"] == {})
    assert reason is None or reason in described["replaced"]["kernels fused"]


def test_the_trial_runs_a_full_pass_and_the_cache_gets_what_it_leaves(
    monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu
) -> None:
    calls: list[str] = []
    sizes: list[int] = []

    def prefill(runner: Any, plan: Any) -> Any:
        sizes.append(sum(chunk.num_tokens for chunk in plan.chunks))
        return original(runner, plan)

    original = ModelRunner._prefill
    monkeypatch.setattr(ModelRunner, "_prefill", prefill)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 15_000_000 + (calls.append("peak") or 0))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (30_000_000 + (calls.append("free") or 0), 40_000_000)
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 8_000_000)
    engine = make_engine(monkeypatch, max_running=60, max_context=1024, gpu_memory_fraction=0.5, gpu_share=0.8)
    assert calls == ["empty", "empty", "reset", "peak", "empty", "free"]
    assert 48 in sizes
    # 0.4 of 40 MB, less the 15 MB of the largest pass, of which the trial's own small cache was a part.
    per_block = engine.cache.num_bytes // (engine.cache.num_blocks + 1)
    trial_blocks = sum(
        -(-len(one.input_ids) // 16) + 1 for one in full_pass(0, 14, max_tokens=48, max_patches=64, max_length=1024)
    )
    trial = per_block * (max(trial_blocks, -(-259 // 16)) + 1)
    assert 0 <= 1_000_000 + trial - engine.cache.num_bytes < per_block


def test_budgets_that_do_not_fit_the_memory_are_lowered_while_loading(
    monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu, caplog: pytest.LogCaptureFixture
) -> None:
    original = ModelRunner._prefill

    def prefill(runner: Any, plan: Any) -> Any:
        if sum(chunk.num_tokens for chunk in plan.chunks) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(runner, plan)

    monkeypatch.setattr(ModelRunner, "_prefill", prefill)
    with caplog.at_level(logging.WARNING):
        engine = make_engine(monkeypatch, cuda_graphs=False, max_batch_tokens=300, max_batch_patches=1200)
    assert engine.describe()["max_batch_tokens"] < 300
    assert engine.stats()["max_batch_tokens"] == engine.describe()["max_batch_tokens"]
    assert "does not fit this GPU's memory" in caplog.text
    monkeypatch.setattr(ModelRunner, "_prefill", lambda runner, plan: _fail())
    with pytest.raises(CheckpointError, match=r"too little memory for the weights and one pass of .* tokens"):
        make_engine(monkeypatch, SdpaAttention)


def _fail() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


GB = 10**9


def test_the_cache_takes_a_share_of_all_memory_less_the_largest_pass() -> None:
    assert bytes_for_cache(total=80 * GB, free=60 * GB, allocated=16 * GB, peak=20 * GB, share=0.9) == 52 * GB
    # Two engines with half a GPU each get the same, whichever loads first.
    first = bytes_for_cache(total=80 * GB, free=64 * GB, allocated=16 * GB, peak=20 * GB, share=0.45)
    second = bytes_for_cache(total=80 * GB, free=28 * GB, allocated=16 * GB, peak=20 * GB, share=0.45)
    assert first == second == 16 * GB
    # What others hold is left to them.
    assert bytes_for_cache(total=80 * GB, free=30 * GB, allocated=16 * GB, peak=20 * GB, share=0.9) == 26 * GB


def test_a_gpu_decodes_as_many_together_as_its_cache_has_room_for() -> None:
    assert [pick_max_running(tokens) for tokens in (1000, 600_000, 700_000, 10**6, 10**8)] == [256, 288, 320, 480, 512]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3000), st.integers(4, 12_000), st.integers(8, 4000))
def test_a_full_pass_fills_its_budgets(max_tokens: int, max_patches: int, max_length: int) -> None:
    requests = full_pass(7, 14, max_tokens=max_tokens, max_patches=max_patches, max_length=max_length)
    assert sum(len(request.input_ids) for request in requests) == max_tokens
    assert all(len(request.input_ids) + request.sampling.max_tokens <= max_length for request in requests)
    visual = sum(request.num_visual_tokens for request in requests)
    texts = max_tokens - visual
    assert visual <= max_patches // MERGE_SIZE**2
    assert visual == max_patches // MERGE_SIZE**2 or texts == len(requests)
    for request in requests:
        assert (request.input_ids == 7).sum() == request.num_visual_tokens
    keys = [medium.content_key for request in requests for medium in request.media]
    assert len(set(keys)) == len(keys)


WIDTHS = Widths(96, 6, 2, 16, 160, 2, 32, 128)


class OtherBlocks(SdpaAttention):
    block_size = 7


class Early(SdpaAttention):
    """Sees one token too many in each later chunk of a prompt."""

    def begin_prefill(self, info: Any, cache: KVCache) -> None:
        super().begin_prefill(info, cache)
        self._prompts = [
            (length, start, blocks, mask if mask is None else mask.roll(-1, 0))
            for length, start, blocks, mask in self._prompts
        ]


def test_the_sample_of_attention_depends_on_no_block_size_and_shows_a_wrong_mask() -> None:
    device = torch.device("cpu")
    expected, same, wrong = (
        run_every_shape(backend, WIDTHS, device, torch.float32) for backend in (SdpaAttention(), OtherBlocks(), Early())
    )
    assert _difference(same, expected, 1.0) is None
    assert _difference(wrong, expected, 1.0) is not None
