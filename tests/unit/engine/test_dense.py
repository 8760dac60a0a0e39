"""Products by weights of a checkpoint: packed ones give what plain ones give, and nothing is held twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipeline.engine import EngineOptions
from pipeline.engine.dense import Dense, can_pack, dense, needs_float32_matmul, padded_rows
from pipeline.engine.engine import NativeEngine
from pipeline.engine.weights import load_checkpoint
from tests.unit.engine.tiny import make_model, mixed_requests, tokens_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 3, 63, 64, 201])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_packed_weight_gives_the_product_of_a_plain_one(rows: int, has_bias: bool) -> None:
    torch.manual_seed(rows)
    weight, x, bias = torch.randn(96, 160), torch.randn(rows, 160), torch.randn(96) if has_bias else None
    torch.testing.assert_close(Dense(weight, bias)(x), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    if needs_float32_matmul(CPU, torch.bfloat16) or not can_pack(torch.bfloat16):
        return
    half, wide = weight.bfloat16(), x.bfloat16()
    expected = F.linear(wide, half, None if bias is None else bias.bfloat16())
    assert torch.equal(Dense(half, None if bias is None else bias.bfloat16())(wide), expected)


def test_few_numbers_of_rows_are_multiplied_and_little_is_padded() -> None:
    padded = {rows: padded_rows(rows) for rows in range(4, 8193)}
    assert all(rows <= size <= rows * 9 / 8 for rows, size in padded.items())
    assert len(set(padded.values())) < 100


def test_linears_lose_their_weights_where_a_packed_copy_is_held() -> None:
    first, second = torch.nn.Linear(8, 4), torch.nn.Linear(8, 6)
    expected = torch.cat([first.weight, second.weight]).detach().clone()
    x = torch.eye(8)
    with torch.inference_mode():
        kept = dense(first, second)
        assert first.weight.shape == (4, 8) and second.weight.shape == (6, 8)
        released = dense(first, second, release=True)
        assert torch.equal(kept(x), released(x))
        torch.testing.assert_close(released(x), F.linear(x, expected, torch.cat([first.bias, second.bias])))
    if can_pack(torch.float32):
        assert first.weight.numel() == second.weight.numel() == 0


def test_a_torch_without_these_operators_multiplies_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise AttributeError("no such operator")

    monkeypatch.setattr("pipeline.engine.dense.pack", missing)
    can_pack.cache_clear()
    try:
        weight, x = torch.randn(4, 8), torch.randn(2, 8)
        assert not can_pack(torch.float32)
        assert torch.equal(Dense(weight, None)(x), F.linear(x, weight))
    finally:
        can_pack.cache_clear()


@pytest.mark.parametrize("is_tied", [True, False])
def test_an_engine_that_owns_its_model_frees_the_plain_weights(tmp_path: Path, is_tied: bool) -> None:
    from tests.unit.engine.tiny import make_config

    make_model(config=make_config(tie_word_embeddings=is_tied)).save_pretrained(tmp_path)
    options = EngineOptions(str(tmp_path), cache_gb=0.01, dtype="float32")
    checkpoint = load_checkpoint(options)
    engine = NativeEngine(checkpoint, options)
    left = {name for name, parameter in checkpoint.model.named_parameters() if parameter.ndim == 2 and len(parameter)}
    assert left == {"model.language_model.embed_tokens.weight"} or not can_pack(torch.float32)
    assert len(tokens_of(engine.generate(mixed_requests(3)))) == 3
