"""In bfloat16 greedy answers may part at near-ties, and only there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from pipeline.demo import CHECKPOINT
from pipeline.engine import EngineOptions, Request
from pipeline.engine.dense import Dense
from pipeline.engine.engine import NativeEngine
from pipeline.engine.reference import ReferenceEngine
from pipeline.engine.weights import from_model
from tests.unit.engine.plain_generate import Scenes
from tests.unit.engine.rounding import assert_rounding_explains
from tests.unit.engine.tiny import make_model, mixed_requests, tokens_of


@pytest.fixture(scope="module")
def rounded() -> Any:
    return make_model(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def exact(rounded: Any) -> Iterator[Any]:
    """The same bfloat16 weights, computed in float32."""
    model = make_model()
    model.load_state_dict({name: tensor.float() for name, tensor in rounded.state_dict().items()})
    yield model


def rows_that_differ(requests: Sequence[Request], half: Any, full: Any) -> int:
    """Rows whose tokens from the engine in bfloat16 are not the reference's, each of which rounding must explain."""
    checkpoint = from_model(half)
    theirs = tokens_of(ReferenceEngine(checkpoint, EngineOptions("it", batch_size=1)).generate(requests))
    ours = tokens_of(NativeEngine(checkpoint, EngineOptions("it", max_batch_tokens=200)).generate(requests))
    return sum(
        assert_rounding_explains(request, mine, other, half, full)
        for request, mine, other in zip(requests, ours, theirs, strict=True)
    )


def test_every_first_difference_lies_at_a_margin_that_rounding_explains(rounded: Any, exact: Any) -> None:
    requests = mixed_requests(60, seed=7)
    assert rows_that_differ(requests, rounded, exact) < len(requests) // 2


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [200])
def test_the_demo_checkpoint_parts_from_transformers_only_where_rounding_explains_it(num_rows: int) -> None:
    """Its weights are bfloat16 already, so the exact model has the same."""
    half, full = (
        Qwen2VLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=dtype).eval()
        for dtype in (torch.bfloat16, torch.float32)
    )
    requests = list(Scenes().rows(num_rows))
    assert rows_that_differ(requests, half, full) <= num_rows // 8


def test_a_margin_above_rounding_is_not_excused(rounded: Any, exact: Any) -> None:
    """Guards the guard: a wrong token of another row would be caught."""
    request = mixed_requests(1, seed=8)[0]
    checkpoint = from_model(rounded)
    tokens = tokens_of(ReferenceEngine(checkpoint, EngineOptions("tiny")).generate([request]))[0]
    with pytest.raises(AssertionError, match="rounding moved logits"):
        assert_rounding_explains(request, ((tokens[0] + 1) % 300, *tokens[1:]), tokens, rounded, exact)


def test_a_product_in_float32_rounded_once_is_what_a_bfloat16_kernel_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(40, 64).bfloat16(), torch.randn(40).bfloat16(), torch.randn(30, 64).bfloat16()
    monkeypatch.setattr("pipeline.engine.dense.needs_float32_matmul", lambda *_: True)
    upcast = Dense(weight, bias)(x)
    monkeypatch.setattr("pipeline.engine.dense.needs_float32_matmul", lambda *_: False)
    direct = Dense(weight, bias)(x)
    assert upcast.dtype == torch.bfloat16
    # Sums in another order may fall on the other side of a rounding boundary: one step, and rarely.
    assert (upcast != direct).float().mean() < 0.05
    torch.testing.assert_close(upcast, direct, rtol=2**-7, atol=1e-2)
