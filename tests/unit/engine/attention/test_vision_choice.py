"""Which kernel computes vision attention: a fake clock, and cuDNN's part played by sdpa."""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from pipeline.engine.attention import vision
from pipeline.engine.attention.packed import Packing, VarlenFrames
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.attention.vision import CudnnFrames, batched, candidates, choose_vision
from pipeline.engine.shard import ShardedAttention
from tests.unit.engine.pretended_gpu import PretendedFlash

CPU = torch.device("cpu")


def test_other_devices_than_hopper_keep_the_backend_s_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(capability: tuple[int, int]) -> list[str]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return [each.name for each in candidates(by_sdpa, "flash", torch.device("cuda"))]

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", types.SimpleNamespace(flash_attn_varlen_func=by_sdpa))
    assert names((8, 0)) == ["flash"]
    assert names((9, 0)) == ["flash", "fa3", "cudnn"]
    assert names((10, 0)) == ["flash", "cudnn"]
    assert [each.name for each in candidates(by_sdpa, "sdpa", CPU)] == ["sdpa"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_backend_uses_the_kernel_that_was_fastest(monkeypatch: pytest.MonkeyPatch, sharded: bool) -> None:
    backend = PretendedFlash()
    whole = ShardedAttention({CPU: PretendedFlash()}, vision=backend) if sharded else backend
    own, fa3 = VarlenFrames("pretended", backend.varlen), VarlenFrames("fa3", by_sdpa)
    monkeypatch.setattr(vision, "candidates", lambda *_: [own, fa3, CudnnFrames(backend.varlen, is_trial=True)])
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


def by_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Packing, keys: Packing, causal: bool
) -> torch.Tensor:
    assert keys is queries and not causal
    backend = SdpaAttention()
    backend.begin_vision(queries.ends.diff().tolist(), CPU)
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


# ---- torch's operators, as they are called


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
