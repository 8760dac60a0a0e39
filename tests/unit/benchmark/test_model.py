"""Models of random weights for the benchmarks: of each family, with the published dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jobs.benchmark.model import SHAPES, family_of, make_config, make_model
from pipeline.engine.models.supported import check_supported
from pipeline.planning.roofline import SHAPES as PUBLISHED
from pipeline.planning.roofline import shape_of


@pytest.mark.parametrize("name", SHAPES)
def test_a_config_says_its_shape_and_is_one_that_the_engine_runs(name: str) -> None:
    config = make_config(SHAPES[name])
    assert shape_of(config.to_dict()) == SHAPES[name]
    assert config.model_type == family_of(SHAPES[name]).model_type
    check_supported(config, path=name, native=True)


@pytest.mark.parametrize(
    ("name", "vision", "text"),
    [
        ("7b", {"embed_dim": 1280, "mlp_ratio": 4, "hidden_act": "quick_gelu"}, {"mrope_section": [16, 24, 24]}),
        (
            "qwen2.5-vl-7b",
            {"fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112, "tokens_per_second": 2, "patch_size": 14},
            {"mrope_section": [16, 24, 24]},
        ),
        (
            "qwen3-vl-2b",
            {"deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304, "patch_size": 16},
            {"mrope_section": [24, 20, 20], "mrope_interleaved": True},
        ),
        ("qwen3-vl-8b", {"deepstack_visual_indexes": [8, 16, 24]}, {"mrope_section": [24, 20, 20]}),
    ],
)
def test_what_a_shape_does_not_say_is_as_published(name: str, vision: dict[str, Any], text: dict[str, Any]) -> None:
    config = make_config(PUBLISHED[name]).to_dict()
    assert config["vision_config"].items() >= vision.items()
    assert config["text_config"]["rope_parameters"].items() >= text.items()


@pytest.mark.parametrize("name", ["tiny", "tiny-2.5", "tiny-3", "2b", "qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_a_model_has_the_weights_that_its_shape_counts(name: str) -> None:
    model = make_model(SHAPES[name], "meta", torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    assert weights == SHAPES[name].num_parameters
