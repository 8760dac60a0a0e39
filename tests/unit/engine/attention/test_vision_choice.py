"""Which kernel computes vision attention: fake kernels, a fake clock, and cuDNN's part played by sdpa."""

from __future__ import annotations

import logging
import os
import sys
import types
from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn import functional as F

from pipeline.engine.attention import vision
from pipeline.engine.attention.packed import FrameAttention, Packing, VarlenFrames
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.attention.vision import CudnnFrames, batched, candidates, choose_vision, fastest, flash_attention_3
from pipeline.engine.shard import ShardedAttention
from tests.unit.engine.pretended_gpu import PretendedFlash

CPU = torch.device("cpu")


class Fake(FrameAttention):
    def __init__(self, name: str, clock: list[float], took: Sequence[float], error: Exception | None = None) -> None:
        self.name = name
        self.clock = clock
        self.took = list(took)
        self.error = error
        self.scale = 1.0

    def begin(self, frame_lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(frame_lengths)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        self.clock[0] += self.took.pop(0)
        return q * self.scale


@pytest.fixture
def clock() -> list[float]:
    return [50.0]


def choose(clock: list[float], *tried: Fake) -> tuple[FrameAttention, dict[str, float]]:
    def seconds(run: Callable[[], object]) -> float:
        before = clock[0]
        run()
        return clock[0] - before

    return fastest(tried, [4, 4], torch.randn(3, 8, 2, 6).unbind(0), seconds)


def test_the_second_of_two_runs_decides_not_the_one_that_plans(clock: list[float]) -> None:
    own = Fake("flash", clock, [1.0, 0.5])
    planned = Fake("cudnn", clock, [9.0, 0.25])
    chosen, times = choose(clock, own, planned, Fake("fa3", clock, [0.1, 0.75]))
    assert chosen is planned and planned.lengths == [4, 4]
    assert times == {"flash": 0.5, "cudnn": 0.25, "fa3": 0.75}


def test_what_raises_or_computes_other_numbers_is_left_out_with_a_warning(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    own = Fake("flash", clock, [1.0, 1.0])
    broken = Fake("fa3", clock, [0.1, 0.1], RuntimeError("no kernel image"))
    wrong = Fake("cudnn", clock, [0.1, 0.1])
    wrong.scale = 1.1
    with caplog.at_level(logging.WARNING):
        chosen, times = choose(clock, own, broken, wrong)
    assert chosen is own and times == {"flash": 1.0}
    assert [message.split(":")[1].split()[0] for message in caplog.messages] == ["fa3", "cudnn"]
    assert "no kernel image" in caplog.text and "differs from that of flash by 0.1 of its norm" in caplog.text


def test_the_backend_s_own_kernel_is_not_replaced_where_it_fails(clock: list[float]) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        choose(clock, Fake("flash", clock, [], RuntimeError("boom")), Fake("fa3", clock, [1.0, 1.0]))


def test_other_devices_than_hopper_keep_the_backend_s_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(capability: tuple[int, int]) -> list[str]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return [each.name for each in candidates(lambda q, k, v, frames: q, "flash", torch.device("cuda"))]

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(vision, "flash_attention_3", lambda: lambda q, k, v, frames: q)
    assert names((8, 0)) == ["flash"]
    assert names((9, 0)) == ["flash", "fa3", "cudnn"]
    assert names((10, 0)) == ["flash", "cudnn"]
    assert [each.name for each in candidates(lambda q, k, v, frames: q, "sdpa", CPU)] == ["sdpa"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_backend_uses_the_kernel_that_was_fastest(monkeypatch: pytest.MonkeyPatch, sharded: bool) -> None:
    backend = PretendedFlash()
    whole = ShardedAttention({CPU: PretendedFlash()}, vision=backend) if sharded else backend
    own, fa3 = VarlenFrames("pretended", backend.within_frames), VarlenFrames("fa3", by_sdpa)
    monkeypatch.setattr(vision, "candidates", lambda *_: [own, fa3, CudnnFrames(backend.within_frames, is_trial=True)])
    monkeypatch.setattr(vision, "batched", as_sdpa)
    times = iter([3.0, 2.0, 1.0])
    choose_vision(
        whole,
        max_patches=30,
        num_heads=2,
        head_dim=8,
        dtype=torch.float32,
        device=CPU,
        seconds=lambda run: next(times),
    )
    frames = backend.frames
    assert whole.vision_name == "cudnn" and isinstance(frames, CudnnFrames) and not frames._is_trial
    assert frames._others is by_sdpa, "the next fastest computes what cuDNN does not"


# ---- cuDNN on equal frames


def as_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> torch.Tensor:
    parts = (each.unflatten(0, (count, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(0, 1)


def by_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, frames: Packing) -> torch.Tensor:
    backend = SdpaAttention()
    backend.begin_vision(frames.ends.diff().tolist(), CPU)
    return backend.vision(q, k, v)


def test_frames_go_to_cudnn_in_powers_of_two_once_much_of_their_length_was_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vision, "MIN_WORK", 16 * 20**2)
    monkeypatch.setattr(vision, "MIN_LENGTH", 1)
    cudnn = CudnnFrames(by_sdpa)
    few = [20] * 11
    assert cudnn.split(few) == [(few, False)]
    assert cudnn.split([3, *few, 5]) == [([3], False), ([20] * 8, True), ([20] * 2, True), ([20], True), ([5], False)]
    assert cudnn.split([3, 3]) == [([3, 3], False)]


def test_windows_are_never_cut_into_batches_for_cudnn() -> None:
    cudnn = CudnnFrames(by_sdpa)
    windows = [64] * 9 + [16]
    cudnn._work[64] = 10 * int(vision.MIN_WORK)
    assert cudnn.split(windows) == [(windows, False)]


def test_a_pass_in_parts_equals_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "MIN_WORK", 2 * 8**2)
    monkeypatch.setattr(vision, "MIN_LENGTH", 1)
    shapes: list[tuple[int, int]] = []

    def batch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> torch.Tensor:
        shapes.append((count, len(q) // count))
        return as_sdpa(q, k, v, count)

    monkeypatch.setattr(vision, "batched", batch)
    cudnn, whole = CudnnFrames(by_sdpa), SdpaAttention()
    for lengths in ([8, 8, 8, 5, 5], [3, 8], [8, 8]):
        q, k, v = torch.randn(sum(lengths), 3, 2, 16).unbind(1)
        cudnn.begin(lengths, CPU)
        whole.begin_vision(lengths, CPU)
        torch.testing.assert_close(cudnn(q, k, v), whole.vision(q, k, v))
    assert shapes == [(2, 8), (1, 8), (1, 8), (2, 8)]


def test_a_length_that_cudnn_refuses_goes_to_the_other_kernel_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> torch.Tensor:
        raise RuntimeError("no execution plans support the graph")

    monkeypatch.setattr(vision, "MIN_WORK", 0)
    monkeypatch.setattr(vision, "MIN_LENGTH", 1)
    monkeypatch.setattr(vision, "batched", refuse)
    cudnn = CudnnFrames(by_sdpa)
    q, k, v = torch.randn(3, 24, 2, 8).unbind(0)
    cudnn.begin([8, 8, 8], CPU)
    for _ in range(2):
        torch.testing.assert_close(cudnn(q, k, v), as_sdpa(q, k, v, 3))
    assert len(caplog.messages) == 1 and "frames of 8 patches" in caplog.messages[0]
    assert cudnn.split([8, 8]) == [([8, 8], False)]
    monkeypatch.setattr(vision, "batched", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    cudnn.begin([12, 12], CPU)
    with pytest.raises(torch.OutOfMemoryError):
        cudnn(q, k, v)


# ---- torch's operators and FlashAttention 3's function, as they are called


def test_torch_s_operators_take_their_arguments_in_the_order_in_which_we_give_them() -> None:
    def first(operator: str, count: int) -> list[str]:
        return [argument.name for argument in getattr(torch.ops.aten, operator).default._schema.arguments[:count]]

    assert first("_scaled_dot_product_cudnn_attention", 8) == [
        *("query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask")
    ]
    assert first("_flash_attention_forward", 10) == [
        *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"),
        "return_debug_mask",
    ]


def test_torch_s_own_attention_leaves_cudnn_to_this_choice() -> None:
    # torch reads it when attention first runs on a GPU; tests/gpu asks which kernel it then takes.
    assert os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == "1"


def test_cudnn_s_operator_accepts_a_packed_pass_and_gives_its_shape() -> None:
    q, k, v = torch.empty(4 * 100, 3, 16, 80, dtype=torch.bfloat16, device="meta").unbind(1)
    out = batched(q, k, v, 4)
    assert (out.shape, out.dtype) == ((400, 16, 80), torch.bfloat16)


class _Broken(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        raise RuntimeError("built for another torch")


@pytest.mark.parametrize("package", ["fa3_fwd_interface", "flash_attn_interface"])
@pytest.mark.parametrize("adds_logarithms", [False, True])
def test_flash_attention_3_is_called_by_the_names_of_its_arguments(
    monkeypatch: pytest.MonkeyPatch, package: str, adds_logarithms: bool
) -> None:
    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False,
    ):  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k and (max_seqlen_q, max_seqlen_k, causal) == (5, 5, False)
        out = by_sdpa(q, k, v, Packing(cu_seqlens_q, max_seqlen_q))
        return (out, None) if adds_logarithms else out

    assert flash_attention_3() is None
    monkeypatch.setitem(sys.modules, package, _Broken(package))
    assert flash_attention_3() is None
    module = types.ModuleType(package)
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, module)
    kernel = flash_attention_3()
    assert kernel is not None
    frames = VarlenFrames("fa3", kernel)
    q, k, v = torch.randn(3, 8, 2, 4).unbind(0)
    frames.begin([3, 5], CPU)
    torch.testing.assert_close(frames(q, k, v), by_sdpa(q, k, v, Packing(torch.tensor([0, 3, 8]), 5)))
