"""The fused Triton kernels in the interpreter, against the same operations in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.engine.kernels.choose import kernel_candidates
from pipeline.engine.kernels.eager import EAGER
from pipeline.engine.kernels.fused import FusedKernels
from pipeline.engine.kernels.sample import Widths, run_every_operation

FUSED = FusedKernels()
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
"""The interpreter is too slow for it."""
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

widths = st.builds(
    Widths,
    hidden=st.integers(1, 70),
    heads=st.integers(1, 3).map(lambda group: 2 * group),
    kv_heads=st.integers(1, 2),
    head_dim=st.integers(1, 9).map(lambda half: 2 * half),
    mlp=st.one_of(st.integers(1, 40), st.just(1025)),
    vision_heads=st.integers(1, 3),
    vision_head_dim=st.integers(1, 9).map(lambda half: 2 * half),
    vision_mlp=st.one_of(st.integers(1, 40), st.just(1025)),
)


def assert_bit_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Also in the sign of zero."""
    assert found.dtype == expected.dtype
    bits = BITS[found.dtype]
    assert torch.equal(found.contiguous().view(bits), expected.contiguous().view(bits))


@contextmanager
def one_exp() -> Iterator[None]:
    """The same exp for torch and the interpreter. Vectorised libraries differ in its last bit, torch's even within a
    tensor, and this is about where results are rounded."""

    def exp(x: Any) -> Any:
        return np.vectorize(np.float64, otypes=[np.float32])(original(np.asarray(x, dtype=np.float64)))

    def one_plus_exp(x: torch.Tensor) -> torch.Tensor:
        return 1 + torch.from_numpy(exp((-x.float()).numpy()))

    original = np.exp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "exp", exp)
        patch.setattr(torch, "sigmoid", lambda x: (1 / one_plus_exp(x)).to(x.dtype))
        patch.setattr(F, "silu", lambda x: (x.float() / one_plus_exp(x)).to(x.dtype))
        yield


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_many_values(dtype: torch.dtype) -> None:
    widths = Widths(67, heads=6, kv_heads=2, head_dim=10, mlp=257, vision_heads=3, vision_head_dim=10, vision_mlp=1030)
    compare(widths, dtype, num_rows=3, gap=1, seed=0)


@pytest.mark.parametrize("max_examples", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_all_but_the_norms_are_bit_equal_and_these_within_rounding(max_examples: int) -> None:
    drawn = given(
        widths=widths,
        dtype=st.sampled_from(DTYPES),
        num_rows=st.integers(1, 3),
        gap=st.integers(0, 3),
        seed=st.integers(0, 1000),
    )
    settings(max_examples=max_examples, deadline=None, phases=NO_SHRINKING)(drawn(compare))()


def compare(widths: Widths, dtype: torch.dtype, num_rows: int, gap: int, seed: int) -> None:
    with one_exp():
        found, expected = (
            run_every_operation(kernels, widths, CPU, dtype, num_rows=num_rows, gap=gap, seed=seed)
            for kernels in (FUSED, EAGER)
        )
    assert found.keys() == expected.keys()
    for name in expected:
        if "norm" in name:
            epsilon = 2 * torch.finfo(dtype).eps
            atol = 4 * epsilon
            if name.startswith("layer norm"):  # numbers that are far from zero and close together lose digits
                summed = expected[name.replace("layer norm", "vision sum")].float()
                spread = summed.std(dim=-1, correction=0).clamp_min(1e-3)
                atol *= max(1.0, float((summed.mean(dim=-1).abs() / spread).max()))
            torch.testing.assert_close(found[name], expected[name], rtol=epsilon, atol=atol)
        else:
            assert_bit_equal(found[name], expected[name])


@given(width=st.integers(1, 300), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None, phases=NO_SHRINKING)
def test_rms_norm_is_bit_equal_where_every_order_of_the_sum_is_exact(width: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, delta = (torch.randint(-8, 9, (2, width), generator=generator).to(dtype) / 4 for _ in range(2))
    weight = torch.randn(width, generator=generator).to(dtype)
    # Once with a residual sum that is exact, once with one that is rounded before the norm.
    large = 1024 * torch.where(hidden < 0, -1.0, 1.0).to(dtype)
    for x, added in ((hidden, delta), (large, delta * 128 * torch.finfo(dtype).eps)):
        found = FUSED.add_rms_norm(x.clone(), added, weight, 1e-6)
        for mine, other in zip(found, EAGER.add_rms_norm(x, added, weight, 1e-6), strict=True):
            assert_bit_equal(mine, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_torch_s_own_within_the_last_bit_of_exp(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-120, 120, 1001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e4, -3e4])]).to(dtype)
    epsilon = 4 * torch.finfo(dtype).eps
    with np.errstate(over="ignore"):
        found = FUSED.quick_gelu(x[None].clone()), FUSED.silu_times_up(x[None, :1006])
    expected = EAGER.quick_gelu(x[None]), EAGER.silu_times_up(x[None, :1006])
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=epsilon, atol=1e-37)


def test_what_is_overwritten_is_the_input_and_nothing_between_its_rows() -> None:
    buffer = torch.full((3, 24), torch.nan)
    x = buffer[:, :20]
    x.copy_(torch.randn(3, 20))
    cos, sin = torch.ones(3, 1, 10), torch.zeros(3, 1, 10)
    FUSED.quick_gelu(x)
    FUSED.add_rms_norm(x, torch.ones(3, 20), torch.ones(20), 1e-6)
    FUSED.add_layer_norm(x, torch.ones(3, 20), torch.nn.LayerNorm(20).requires_grad_(False))
    FUSED.rotate_vision(buffer[:, :18].unflatten(1, (3, 1, 6)), cos[..., None, :6], sin[..., None, :6])
    assert not x.isnan().any() and buffer[:, 20:].isnan().all()


def test_fused_kernels_are_for_cuda_alone() -> None:
    cuda = torch.device("cuda")
    asked = (("eager", CPU), ("auto", CPU), ("eager", cuda), ("auto", cuda))
    names = [[candidate.name for candidate in kernel_candidates(*each, torch.float16)] for each in asked]
    assert names == [["eager"], ["eager"], ["eager"], ["fused", "eager"]]
