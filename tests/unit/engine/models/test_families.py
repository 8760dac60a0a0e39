"""Every model family in the native engine against transformers: towers, tokens, config fields, published layouts."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.engine import EngineOptions, load_engine
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.engine import NativeEngine
from pipeline.engine.models.mrope import lay_out_prompt
from pipeline.engine.models.qwen2_5_vl import frame_windows
from pipeline.engine.models.qwen3_vl import interpolation
from pipeline.engine.models.registry import ARCHITECTURES
from pipeline.engine.models.supported import check_supported
from pipeline.engine.pixels import PixelTable
from pipeline.engine.reference import ReferenceEngine
from pipeline.engine.weights import from_model
from pipeline.errors import CheckpointError
from tests.unit.engine.plain_generate import (
    SMALLEST_MARGIN,
    World,
    clip_pixels,
    numbered_alike,
    plain_generate,
    random_world,
)
from tests.unit.engine.rounding import assert_rounding_explains, smallest_margin
from tests.unit.engine.test_same_tokens import ANY_BUDGETS, check_in_any_order, native, reference
from tests.unit.engine.tiny import (
    IMAGE_PAD,
    VIDEO_PAD,
    make_config,
    make_medium,
    make_model,
    mixed_requests,
    tokens_of,
)

NEW = ("qwen2_5_vl", "qwen3_vl")
TALL = {
    # Grouped heads and untied embeddings; odd numbers of layers; the depths of published towers.
    "qwen2_vl": [
        {
            "tie_word_embeddings": False,
            "text_config": {"num_key_value_heads": 1, "num_hidden_layers": 5},
            "vision_config": {"depth": 7},
        },
    ],
    "qwen2_5_vl": [
        {"tie_word_embeddings": False, "text_config": {"num_key_value_heads": 1, "num_hidden_layers": 5}},
        {"vision_config": {"depth": 7, "fullatt_block_indexes": [6]}, "text_config": {"num_key_value_heads": 6}},
    ],
    "qwen3_vl": [
        {
            "tie_word_embeddings": False,
            "text_config": {"num_key_value_heads": 1, "num_hidden_layers": 5},
            "vision_config": {"depth": 24, "deepstack_visual_indexes": [5, 11, 17]},
        },
        {"vision_config": {"depth": 27, "deepstack_visual_indexes": [8, 16, 24]}},
    ],
}
make_world = cache(lambda family, num_rows: random_world(num_rows, family))


@pytest.fixture(scope="module", params=NEW)
def world(request: pytest.FixtureRequest) -> World:
    made: World = make_world(request.param, 24)
    return made


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_packed_passes_equal_transformers_tower_medium_by_medium(family: str) -> None:
    model = make_model(config=make_config(family))
    table = PixelTable(EngineOptions("tiny"), device=torch.device("cpu"), dtype=torch.float32)
    tower = ARCHITECTURES[family].vision(model, SdpaAttention(), table)
    rng = np.random.default_rng(5)
    media = [make_medium(rng, "video" if i % 3 == 2 else "image", max_side=20, family=family) for i in range(8)]
    with torch.inference_mode():
        ours = {id(medium): tokens for medium, tokens in tower.encode(media, 300)}
        for medium in media:
            values = table(torch.from_numpy(medium.patches), medium.kind)
            theirs = model.model.visual(values, grid_thw=torch.tensor([medium.grid_thw]))
            deep = getattr(theirs, "deepstack_features", None) or []
            expected = torch.cat([theirs.pooler_output, *deep], dim=1)
            torch.testing.assert_close(ours[id(medium)], expected, rtol=1e-4, atol=1e-4)


def test_windows_are_those_of_transformers() -> None:
    from transformers.vision_utils import get_vision_window_index

    for h, w in [(2, 2), (8, 8), (16, 24), (18, 10), (74, 74), (6, 40)]:
        order, lengths = frame_windows(h, w, 4)
        index, ends = get_vision_window_index(torch.tensor([[1, h, w]]), 2, 112, 14)
        assert order.tolist() == index.tolist() and np.cumsum([0, *lengths]).tolist() == ends.tolist()


def test_places_of_the_table_and_their_weights_are_those_of_transformers_to_the_bit() -> None:
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    rng = random.Random(3)
    for h, w in [(2, 2), (48, 48), *((2 * rng.randint(1, 40), 2 * rng.randint(1, 40)) for _ in range(30))]:
        places, weights = interpolation(h, w, 48)
        expected = get_vision_interpolation_indices_and_weights(
            torch.tensor([[1, h, w]]), 48, mode="bilinear", align_corners=True, spatial_merge_size=2
        )
        assert np.array_equal(places, expected[0].numpy()) and np.array_equal(weights, expected[1].numpy())


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.0, 2.0 / 1.9])
def test_positions_of_a_video_count_seconds_as_transformers_does(seconds: float) -> None:
    config = make_config("qwen2_5_vl")
    model, rule = make_model(config=config), ARCHITECTURES["qwen2_5_vl"].positions(config)
    medium = make_medium(np.random.default_rng(1), "video", max_steps=9, family="qwen2_5_vl")
    object.__setattr__(medium, "seconds_per_step", seconds)
    ids = torch.tensor([[1, 2, *[VIDEO_PAD] * medium.num_visual_tokens]])
    theirs, _ = model.model.get_rope_index(
        ids,
        2 * (ids == VIDEO_PAD).int(),
        video_grid_thw=torch.tensor([medium.grid_thw]),
        second_per_grid_ts=torch.tensor([seconds]),
    )
    request = mixed_requests(1)[0]
    object.__setattr__(request, "input_ids", ids[0].numpy().astype(np.int32))
    object.__setattr__(request, "media", (medium,))
    layout = lay_out_prompt(request, image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD, rule=rule)
    assert layout.positions.tolist() == theirs[:, 0].tolist()


def test_tokens_are_those_of_plain_generate(world: World) -> None:
    assert tokens_of(reference(world, 5).generate(world.requests)) == world.expected
    assert tokens_of(native(world).generate(world.requests)) == world.expected
    assert len(set(world.expected)) > len(world.expected) // 2


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**{**ANY_BUDGETS, "max_batch_tokens": st.integers(16, 40), "max_batch_patches": st.integers(4, 60)})
def test_chunks_that_end_inside_an_image_and_preemptions_change_no_token(
    world: World, seed: int, **options: Any
) -> None:
    check_in_any_order(world, 12, seed, **options)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("family", "shape"), [("qwen2_vl", 0), *((family, number) for family in NEW for number in (-1, 0, 1))]
)
@settings(max_examples=2, deadline=None, phases=[Phase.generate])
@given(**{**ANY_BUDGETS, "max_running": st.integers(8, 100), "max_batch_tokens": st.integers(40, 400)})
def test_200_mixed_rows_under_any_budgets_in_several_shapes(family: str, shape: int, seed: int, **options: Any) -> None:
    check_in_any_order(shaped_world(family, shape), 200, seed, **options)


@cache
def shaped_world(family: str, shape: int) -> World:
    return random_world(200, family, **({} if shape < 0 else TALL[family][shape]))


@pytest.mark.slow
def test_videos_that_last_longer_than_their_frames_are_wide_give_the_tokens_of_trained_positions() -> None:
    """transformers lets the text after such a video begin before its end; the reference engine hands in ours."""
    found = make_world("qwen2_5_vl", 120)
    rows = [request for request in found.odd_requests if smallest_margin(found.model, request) > 2e-3][:60]
    assert len(rows) > 40
    expected = tokens_of(reference(found, 1).generate(rows))
    assert tokens_of(native(found, cache_tokens=512, max_batch_tokens=64).generate(rows)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", NEW)
def test_in_bfloat16_answers_part_at_margins_that_rounding_explains(family: str) -> None:
    config = make_config(family)
    half, full = make_model(config=config, dtype=torch.bfloat16), make_model(config=config)
    full.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    requests = mixed_requests(60, seed=7, family=family)
    checkpoint = from_model(half)
    theirs = tokens_of(ReferenceEngine(checkpoint, EngineOptions("it", batch_size=1)).generate(requests))
    ours = tokens_of(NativeEngine(checkpoint, EngineOptions("it", max_batch_tokens=200)).generate(requests))
    different = sum(
        assert_rounding_explains(request, mine, other, half, full)
        for request, mine, other in zip(requests, ours, theirs, strict=True)
    )
    assert different < len(requests) // 2


# ---- checkpoints

PREFIXES = {
    # As published: the first releases have the tower at the top and the text model below `model.`.
    "qwen2_vl": {"model.visual.": "visual.", "model.language_model.": "model."},
    "qwen2_5_vl": {"model.visual.": "visual.", "model.language_model.": "model."},
    "qwen3_vl": {},
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_checkpoint_in_the_published_layout_loads(family: str, tmp_path: Path) -> None:
    model = make_model(config=make_config(family, tie_word_embeddings=False))
    rule = ARCHITECTURES[family].positions(model.config)
    requests = [row for row in mixed_requests(8, seed=2, family=family) if numbered_alike(row, rule)]
    expected = [plain_generate(model, request, clip_pixels)[0] for request in requests]
    config = model.config.to_dict()
    if PREFIXES[family]:  # the text model's fields lie flat beside the others
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope["rope_theta"]
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config = {**{k: v for k, v in text.items() if k not in ("model_type", "layer_types")}, **config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in model.state_dict().items():
        for new, old in PREFIXES[family].items():
            if name.startswith(new):
                name = old + name.removeprefix(new)
                break
        tensors[name] = tensor.clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine = load_engine(EngineOptions(str(tmp_path), cache_gb=0.01, dtype="float32"))
    found = tokens_of(engine.generate(requests))
    assert found == expected


# ---- config fields

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BOTH_TEXT: dict[str, list[Any]] = {
    "tie_word_embeddings": [False],
    "text_config.vocab_size": [330],
    "text_config.intermediate_size": [96],
    "text_config.num_hidden_layers": [2],
    "text_config.num_key_value_heads": [1],
    "text_config.rms_norm_eps": [0.3],
    "vision_config.depth": [3],
    "vision_config.hidden_size": [128],
    "vision_config.num_heads": [4],
    "vision_config.intermediate_size": [64],
    "vision_config.rope_parameters": [{"rope_type": "axial", "rope_theta": 30.0}],
}
HONOURED: dict[str, dict[str, list[Any]]] = {
    "qwen2_5_vl": {
        **BOTH_TEXT,
        "text_config.hidden_size": [192],
        "text_config.num_attention_heads": [2],
        "text_config.rope_parameters": [{**ROPE, "mrope_section": [4, 2, 2]}],
        "text_config.eos_token_id": [7],
        "vision_config.tokens_per_second": [9],
        "vision_config.window_size": [56],
        "vision_config.fullatt_block_indexes": [[0, 1, 2]],
    },
    "qwen3_vl": {
        **BOTH_TEXT,
        "text_config.hidden_size": [120],
        "text_config.num_attention_heads": [2],
        "text_config.head_dim": [32],
        "text_config.attention_bias": [True],
        "text_config.rope_parameters": [{**ROPE, "mrope_section": [4, 4, 4]}],
        "vision_config.hidden_act": ["relu"],
        "vision_config.num_position_embeddings": [100],
        "vision_config.deepstack_visual_indexes": [[0, 3], []],
    },
}
BOTH_REFUSED: dict[str, list[Any]] = {
    "text_config.hidden_act": ["gelu"],
    "text_config.rope_parameters": [{**ROPE, "mrope_section": [2, 3, 4]}],
    "quantization_config": [{"quant_method": "fp8"}],
    "vision_config.out_hidden_size": [128],
    "vision_config.in_channels": [1],
    "vision_config.patch_size": [12],
    "vision_config.spatial_merge_size": [4],
    "vision_config.temporal_patch_size": [1],
}
REFUSED: dict[str, dict[str, list[Any]]] = {
    "qwen2_5_vl": {
        **BOTH_REFUSED,
        "text_config.use_sliding_window": [True],
        "text_config.layer_types": [["full_attention", "sliding_attention", "full_attention"]],
        "vision_config.hidden_act": ["gelu"],
    },
    "qwen3_vl": {
        **BOTH_REFUSED,
        "vision_config.num_position_embeddings": [35],
        "vision_config.deepstack_visual_indexes": [[2, 1], [1, 9], [0, 1, 2, 3]],
    },
}
WITHOUT_EFFECT = {
    *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    *(f"text_config.{name}" for name in ("max_position_embeddings", "initializer_range", "use_cache")),
    *(f"text_config.{name}" for name in ("sliding_window", "max_window_layers", "attention_dropout")),
    *("text_config.bos_token_id", "text_config.pad_token_id", "vision_config.initializer_range"),
}
"""As for Qwen2-VL: tests/unit/engine/models/test_supported.py says why."""


def changed_config(family: str, name: str, value: Any) -> Any:
    """make_config's with one field changed, and what has to change with it."""
    *section, field = name.split(".")
    changes: dict[str, Any] = {section[0]: {field: value}} if section else {field: value}
    if name == "text_config.hidden_size":
        changes["vision_config"] = {"out_hidden_size": value}
    if family == "qwen2_5_vl" and name in ("text_config.hidden_size", "text_config.num_attention_heads"):
        head_dim = {"text_config.hidden_size": 32, "text_config.num_attention_heads": 48}[name]
        changes["text_config"]["rope_parameters"] = {**ROPE, "mrope_section": [head_dim // 2 - 10, 5, 5]}
    if name == "text_config.head_dim":
        changes["text_config"]["rope_parameters"] = {**ROPE, "mrope_section": [6, 5, 5]}
    if name == "vision_config.depth" and family == "qwen2_5_vl":
        changes["vision_config"]["fullatt_block_indexes"] = [1]
    if name == "text_config.use_sliding_window":
        changes["text_config"] |= {"sliding_window": 4, "max_window_layers": 1}
    return make_config(family, **changes)


def cases(tables: dict[str, dict[str, list[Any]]]) -> list[Any]:
    return [
        pytest.param(family, name, value, id=f"{family}-{name}-{number}")
        for family, table in tables.items()
        for name, values in table.items()
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize("family", NEW)
def test_every_field_of_the_configs_is_in_a_table(family: str) -> None:
    from transformers import PreTrainedConfig

    config = make_config(family)
    sections = ("text_config", "vision_config")
    inherited = {field.name for field in fields(PreTrainedConfig)} | {"model_type", *sections}
    named = {field.name for field in fields(config)} - inherited
    for section in sections:
        named |= {
            f"{section}.{field.name}" for field in fields(getattr(config, section)) if field.name not in inherited
        }
    known = {*HONOURED[family], *REFUSED[family], *WITHOUT_EFFECT}
    assert named - known == set(), "new fields of transformers: honour them, refuse them, or say why they do nothing"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name", "value"), cases(HONOURED))
def test_a_honoured_field_gives_the_tokens_of_transformers(family: str, name: str, value: Any) -> None:
    config = changed_config(family, name, value)
    check_supported(config, path="tiny", native=True)
    model, rows = make_model(config=config), mixed_requests(16, seed=4, family=family)
    expected = [plain_generate(model, row, clip_pixels) for row in rows]
    ours = tokens_of(NativeEngine(from_model(model), EngineOptions("tiny", cache_gb=0.01)).generate(rows))
    rule = ARCHITECTURES[family].positions(config)
    clear = [
        (mine, tokens)
        for row, mine, (tokens, margin) in zip(rows, ours, expected, strict=True)
        if margin > SMALLEST_MARGIN and numbered_alike(row, rule)
    ]
    assert len(clear) > 6 and all(mine == tokens for mine, tokens in clear)


@pytest.mark.parametrize(("family", "name", "value"), cases(REFUSED))
def test_a_field_that_the_engine_cannot_honour_is_refused(family: str, name: str, value: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"^tiny: config.json is not supported: .*, expected .*; use a checkpoint"
    ):
        check_supported(changed_config(family, name, value), path="tiny", native=True)
