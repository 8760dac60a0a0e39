"""Of the last layer the text model computes the tokens that are wanted: the same numbers for less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.engine.attention.interface import PrefillInfo
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.models.registry import ARCHITECTURES
from pipeline.engine.models.text_model import DeepFeatures, TextModel
from tests.unit.engine.tiny import make_config, make_model

LENGTHS = [5, 1, 9]
WANTED = torch.tensor([4, 14])


@pytest.mark.parametrize("num_deep", [0, 2, 3])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_wanted_tokens_get_what_all_tokens_get_and_the_others_end_behind_the_last_attention(
    family: str, num_deep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TextModel(make_model(config=make_config(family)), ARCHITECTURES[family])
    rows = torch.tensor([1, 2, 4, 12])
    deep = DeepFeatures(rows, torch.randn(len(rows), num_deep, 96)) if num_deep else None
    everything = forward(text, deep, None)
    counts = count_rows(text, monkeypatch)
    wanted = forward(text, deep, WANTED)
    torch.testing.assert_close(wanted, everything[WANTED])
    # Features that are added behind the last layer need all of its tokens.
    assert counts == [15, 15, 15 if num_deep == len(text.layers) else 2]


def forward(text: TextModel, deep: DeepFeatures | None, wanted: torch.Tensor | None) -> torch.Tensor:
    """Hidden states behind all layers of packed prompts, the same in each call."""
    num_tokens = sum(LENGTHS)
    cpu = torch.device("cpu")
    cache = KVCache(
        [cpu] * len(text.layers),
        num_blocks=4,
        block_size=32,
        num_kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        dtype=torch.float32,
    )
    attention = SdpaAttention()
    slots = torch.arange(num_tokens)
    attention.begin_prefill(PrefillInfo(LENGTHS, [0] * len(LENGTHS), [[]] * len(LENGTHS), slots), cache)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention.prefill(q, k, v, cache, layer)

    with torch.inference_mode():
        hidden = text.embed(torch.arange(num_tokens))
        rotation = text.rotation(torch.arange(num_tokens).expand(3, -1))
        return text.forward(hidden, rotation, cache, slots, attend, deep, wanted)


def count_rows(text: TextModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the MLP of each layer gets from now on."""
    counts: list[int] = []

    def counted(mlp: Any) -> Any:
        def run(x: torch.Tensor, kernels: Any) -> torch.Tensor:
            counts.append(len(x))
            result: torch.Tensor = mlp(x, kernels)
            return result

        return run

    for layer in text.layers:
        monkeypatch.setattr(layer, "mlp", counted(layer.mlp))
    return counts
