"""The kernels for a CPU's vector instructions against the same operations in plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.kernels import choose
from pipeline.engine.kernels.choose import kernel_candidates
from pipeline.engine.kernels.eager import EAGER
from pipeline.engine.kernels.sample import Widths, run_every_operation
from pipeline.engine.kernels.simd import SimdKernels
from pipeline.engine.simd import library
from pipeline.engine.simd.library import SimdLibrary
from tests.unit.engine.simd.instructions import every_instruction_set

CPU = torch.device("cpu")
ONE_ROUNDING = {torch.bfloat16: 2.0**-7, torch.float32: 1e-5}
"""Of a value; the results of norms are sums in another order."""

WIDTHS = st.builds(
    Widths,
    hidden=st.sampled_from([1, 15, 16, 67, 768]),
    heads=st.sampled_from([2, 6]),
    kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([2, 10, 64, 80, 128]),
    mlp=st.sampled_from([1, 16, 257, 3072]),
    vision_heads=st.integers(1, 3),
    vision_head_dim=st.sampled_from([2, 10, 64, 72, 80]),
    vision_mlp=st.sampled_from([1, 16, 257, 5120]),
)


@every_instruction_set
@settings(max_examples=30, deadline=None)
@given(widths=WIDTHS, num_rows=st.sampled_from([1, 3, 50]), gap=st.sampled_from([0, 1]), seed=st.integers(0, 1000))
def test_every_operation_is_that_of_torch(
    instructions: tuple[torch.dtype, tuple[str, ...]], widths: Widths, num_rows: int, gap: int, seed: int
) -> None:
    dtype = instructions[0]
    found, expected = (
        run_every_operation(kernels, widths, CPU, dtype, num_rows=num_rows, gap=gap, seed=seed)
        for kernels in (SimdKernels(SimdLibrary(*instructions)), EAGER)
    )
    for name, values in expected.items():
        assert found[name].dtype == dtype and not found[name].isnan().any()
        close = {"rtol": ONE_ROUNDING[dtype], "atol": ONE_ROUNDING[dtype]}
        torch.testing.assert_close({name: found[name]}, {name: values}, **close)


@every_instruction_set
def test_values_of_any_size_give_those_of_torch(instructions: tuple[torch.dtype, tuple[str, ...]]) -> None:
    dtype = instructions[0]
    kernels = SimdKernels(SimdLibrary(*instructions))
    sizes = torch.tensor([0.0, -0.0, 1e-30, 0.5, 3.0, 20.0, 80.0, 90.0, 200.0, 1e30, torch.inf])
    x = torch.cat([sizes, -sizes, torch.tensor([torch.nan])]).to(dtype)[None]
    same = {"rtol": ONE_ROUNDING[dtype], "atol": 1e-30, "equal_nan": True}
    torch.testing.assert_close(kernels.quick_gelu(x.clone()), EAGER.quick_gelu(x.clone()), **same)
    gate_up = torch.cat([x, torch.ones_like(x)], dim=1)
    torch.testing.assert_close(kernels.silu_times_up(gate_up.clone()), EAGER.silu_times_up(gate_up.clone()), **same)


@every_instruction_set
def test_threads_share_the_rows_and_change_nothing(instructions: tuple[torch.dtype, tuple[str, ...]]) -> None:
    kernels = SimdKernels(SimdLibrary(*instructions))
    x = torch.randn(300, 1030).to(instructions[0])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        shared = kernels.silu_times_up(x)
        torch.set_num_threads(1)
        assert torch.equal(kernels.silu_times_up(x), shared)
    finally:
        torch.set_num_threads(before)


@every_instruction_set
def test_weights_of_another_dtype_and_columns_apart_are_left_to_torch(
    instructions: tuple[torch.dtype, tuple[str, ...]],
) -> None:
    dtype = instructions[0]
    kernels = SimdKernels(SimdLibrary(*instructions))
    x, weight = torch.randn(5, 40).to(dtype), torch.rand(40)
    other = weight.to(torch.float64)
    for each, values in (
        (other, x),
        (weight.to(dtype), x.T.contiguous().T),
        (weight[:20].to(dtype).expand(3, -1), None),
    ):
        if values is None:
            heads = torch.randn(5, 4, 20).to(dtype)
            found, expected = (one.norm_heads(heads.clone(), each, 1e-6) for one in (kernels, EAGER))
        else:
            found, expected = (one.add_rms_norm(values.clone(), None, each, 1e-6)[1] for one in (kernels, EAGER))
        assert torch.equal(found, expected)


def test_a_cpu_tries_them_where_it_has_the_instructions_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(wanted: str = "auto", dtype: torch.dtype = torch.float32) -> list[str]:
        return [candidate.name for candidate in kernel_candidates(wanted, CPU, dtype)]

    monkeypatch.setattr(library, "cpu_features", lambda: frozenset(["fma", "avx2"]))
    monkeypatch.setattr(choose, "compiler", lambda: ["cc"])
    assert (names(), names("eager"), names(dtype=torch.bfloat16)) == (["simd", "eager"], ["eager"], ["eager"])
    monkeypatch.setattr(choose, "compiler", lambda: None)
    assert names() == ["eager"]
