"""What works in slices of rows on a CPU gives what all rows at once give, and rounds as transformers does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm, apply_rotary_pos_emb_vision

from pipeline.engine.dense import Dense, dense
from pipeline.engine.kernels import eager
from pipeline.engine.kernels.eager import EAGER
from pipeline.engine.models.mlp import GatedMlp, PlainMlp, align_width

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def product(inputs: int, outputs: int) -> Dense:
    return Dense(torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs))


@pytest.mark.parametrize("rows", [1, 4, 11])
def test_mlps_in_slices_give_what_all_rows_give(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(rows)
    plain = PlainMlp(product(6, 24), torch.nn.GELU(), product(24, 6))
    quick = PlainMlp(plain.fc1, None, plain.fc2, has_quick_gelu=True)
    gated = GatedMlp(product(6, 40), product(20, 6))
    x = torch.randn(rows, 6)
    wide, (gate, up) = plain.fc1(x), gated.gate_up(x).chunk(2, dim=-1)
    expected = [plain.fc2(F.gelu(wide)), plain.fc2(wide * torch.sigmoid(1.702 * wide)), gated.down(F.silu(gate) * up)]
    monkeypatch.setattr(eager, "ROWS_IN_CACHE", 4)
    for mlp, result in zip((plain, quick, gated), expected, strict=True):
        torch.testing.assert_close(mlp(x, EAGER), result)


@pytest.mark.parametrize(("dtype", "width", "aligned"), [(torch.bfloat16, 20, 24), (torch.float32, 20, 20)])
def test_a_width_that_is_aligned_with_zeros_gives_the_same(dtype: torch.dtype, width: int, aligned: int) -> None:
    torch.manual_seed(0)
    gate, up, down = (torch.nn.Linear(*sizes, dtype=dtype) for sizes in ((6, width), (6, width), (width, 6)))
    x = torch.randn(11, 6, dtype=dtype)
    with torch.inference_mode():
        expected = GatedMlp(dense(gate, up), dense(down))(x, EAGER)
        align_width(gate, up, down)
        found = GatedMlp(dense(gate, up), dense(down))
        assert found.width == aligned and gate.weight.shape == (aligned, 6)
        torch.testing.assert_close(found(x, EAGER), expected)
        torch.testing.assert_close(down(F.silu(gate(x)) * up(x)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_in_slices_has_the_bits_of_transformers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "ROWS_IN_CACHE", 4)
    qkv, angles = torch.randn(11, 3, 2, 8).to(dtype), torch.randn(11, 4).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected = (*apply_rotary_pos_emb_vision(qkv[:, 0].clone(), qkv[:, 1].clone(), cos, sin), qkv[:, 2].clone())
    found = EAGER.rotate_vision(qkv, cos[:, None, None], sin[:, None, None])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [80, 1536])
def test_the_norm_has_the_bits_of_transformers(dtype: torch.dtype, width: int) -> None:
    norm = Qwen2VLRMSNorm(width).to(dtype)
    norm.weight.data.normal_()
    hidden, delta = (3 * torch.randn(2, 64, width)).to(dtype)
    total = hidden + delta
    summed, normed = EAGER.add_rms_norm(hidden, delta, norm.weight.data, norm.variance_epsilon)
    assert torch.equal(summed, total) and torch.equal(normed, norm(total))
