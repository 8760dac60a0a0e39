"""Which of several kernels is taken: fake kernels, a fake clock, and FlashAttention 3's part played by a module."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch

from pipeline.engine.attention import fastest
from pipeline.engine.attention.fastest import by_speed, choose_prefill, hopper_kernels
from pipeline.engine.attention.interface import PrefillInfo
from pipeline.engine.attention.packed import PackedAttention, Packing, pack
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.shard import ShardedAttention
from tests.unit.engine.pretended_gpu import PretendedFlash

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def clock() -> list[float]:
    return [50.0]


def kernel(
    clock: list[float], took: Sequence[float], *, scale: float = 1.0, error: Exception | None = None
) -> Callable[[], torch.Tensor]:
    times = iter(took)

    def call() -> torch.Tensor:
        if error is not None:
            raise error
        clock[0] += next(times)
        return torch.arange(1.0, 9.0) * scale

    return call


def measure(clock: list[float], **tried: Callable[[], torch.Tensor]) -> dict[str, float]:
    def seconds(run: Callable[[], object]) -> float:
        before = clock[0]
        run()
        return clock[0] - before

    return by_speed("vision", tried, seconds)


def test_the_second_of_two_runs_decides_not_the_one_that_plans(clock: list[float]) -> None:
    times = measure(
        clock, flash=kernel(clock, [1.0, 0.5]), cudnn=kernel(clock, [9.0, 0.25]), fa3=kernel(clock, [0.1, 0.75])
    )
    assert list(times.items()) == [("cudnn", 250), ("flash", 500), ("fa3", 750)]


def test_what_raises_or_computes_other_numbers_is_left_out_with_a_warning(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        times = measure(
            clock,
            flash=kernel(clock, [1.0, 1.0]),
            fa3=kernel(clock, [], error=RuntimeError("no kernel image")),
            cudnn=kernel(clock, [0.1, 0.1], scale=1.1),
        )
    assert times == {"flash": 1000}
    assert [message.split(":")[1].split()[0] for message in caplog.messages] == ["fa3", "cudnn"]
    assert "no kernel image" in caplog.text and "differs from that of flash by 0.1 of its norm" in caplog.text


def test_the_backend_s_own_kernel_is_not_replaced_where_it_fails(clock: list[float]) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        measure(clock, flash=kernel(clock, [], error=RuntimeError("boom")), fa3=kernel(clock, [1.0, 1.0]))


class _Broken(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        raise RuntimeError("built for another torch")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def flash_attention_3(*, adds_logarithms: bool = False) -> Callable[..., object]:
    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False,
    ):  # fmt: skip
        queries, keys = Packing(cu_seqlens_q, max_seqlen_q), Packing(cu_seqlens_k, max_seqlen_k)
        out = PretendedFlash().varlen(q, k, v, queries, keys, causal)
        return (out, None) if adds_logarithms else out

    return flash_attn_varlen_func


@pytest.mark.parametrize("package", ["fa3_fwd_interface", "flash_attn_interface"])
@pytest.mark.parametrize("adds_logarithms", [False, True])
def test_flash_attention_3_is_called_by_the_names_of_its_arguments(
    monkeypatch: pytest.MonkeyPatch, hopper: None, package: str, adds_logarithms: bool
) -> None:
    assert hopper_kernels(CUDA) == {}
    monkeypatch.setitem(sys.modules, package, _Broken(package))
    assert hopper_kernels(CUDA) == {}
    function = flash_attention_3(adds_logarithms=adds_logarithms)
    monkeypatch.setitem(sys.modules, package, types.SimpleNamespace(flash_attn_varlen_func=function))
    assert hopper_kernels(CPU) == {}
    (found,) = hopper_kernels(CUDA).values()
    q, k, v = torch.randn(8, 4, 4), torch.randn(11, 2, 4), torch.randn(11, 2, 4)
    queries, keys = pack([3, 5], CPU), pack([3, 8], CPU)
    for causal in (False, True):
        expected = PretendedFlash().varlen(q, k, v, queries, keys, causal)
        torch.testing.assert_close(found(q, k, v, queries, keys, causal), expected)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("theirs", [1.0, 3.0])
def test_prefill_uses_the_kernel_that_was_fastest(
    monkeypatch: pytest.MonkeyPatch, sharded: bool, theirs: float
) -> None:
    def kernels(device: torch.device) -> dict[str, object]:
        def kernel(q, k, v, queries, keys, causal):  # type: ignore[no-untyped-def]
            calls.append((len(q), len(k), causal))
            return PretendedFlash().varlen(q, k, v, queries, keys, causal)

        return {"fa3": kernel}

    calls: list[tuple[int, int, bool]] = []
    monkeypatch.setattr(fastest, "hopper_kernels", kernels)
    backend = PretendedFlash()
    whole = ShardedAttention({CPU: backend}, vision=PretendedFlash()) if sharded else backend
    times: Iterator[float] = iter([2.0, theirs])
    choose_prefill(
        whole,
        max_tokens=4096,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        device=CPU,
        seconds=lambda run: next(times),
    )
    assert calls == [(4096, 5120, True)], "one of the prompts continues what lies in the cache"
    assert whole.kernel_ms["prefill"] == {"pretended": 2000, "fa3": 1000 * theirs}
    assert whole.prefill_name == ("fa3" if theirs < 2 else "pretended")
    _prefill(backend)
    assert len(calls) == (2 if theirs < 2 else 1)


def _prefill(backend: PackedAttention) -> None:
    cache = KVCache([CPU], num_blocks=4, block_size=16, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    q, k, v = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    slots = torch.arange(7)
    cache.write(0, k, v, slots)
    backend.begin_prefill(PrefillInfo([3, 4], [0, 0], [[0], [1]], slots), cache)
    got = backend.prefill(q, k, v, cache, 0)
    for start, stop in pairwise([0, 3, 7]):
        whole = pack([stop - start], CPU)
        expected = PretendedFlash().varlen(*(each[start:stop] for each in (q, k, v)), whole, whole, True)
        torch.testing.assert_close(got[start:stop], expected)
