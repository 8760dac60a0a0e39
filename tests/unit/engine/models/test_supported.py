"""No field of a config is ignored: with another value tokens equal transformers', or loading refuses it."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.engine import EngineOptions, Medium, Request, SamplingParams, load_engine
from pipeline.engine.engine import NativeEngine
from pipeline.engine.models.supported import check_supported
from pipeline.engine.weights import from_model
from pipeline.errors import CheckpointError
from tests.unit.engine.plain_generate import clip_pixels, plain_generate
from tests.unit.engine.tiny import IM_START, VISION_END, VISION_START, make_config, make_model, tokens_of

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

# What a change of a field does to tokens; the values are those that make_config does not have.
HONOURED: dict[str, list[Any]] = {
    "tie_word_embeddings": [False],
    "text_config.vocab_size": [330],
    "text_config.hidden_size": [192],  # and of the vision tower: see changed_config
    "text_config.intermediate_size": [96],
    "text_config.num_hidden_layers": [2],
    "text_config.num_attention_heads": [2],
    "text_config.num_key_value_heads": [1, None],
    "text_config.rms_norm_eps": [0.3],
    "text_config.rope_parameters": [
        {**ROPE, "rope_theta": 100.0},
        {**ROPE, "mrope_section": [4, 2, 2]},
        {**ROPE, "rope_type": "linear", "factor": 3.0},
        {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            **{**ROPE, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
    ],
    "text_config.eos_token_id": ["an answer's token"],
    "vision_config.depth": [1],
    "vision_config.embed_dim": [128],
    "vision_config.hidden_act": ["relu"],
    "vision_config.mlp_ratio": [3],
    "vision_config.num_heads": [4],
    "vision_config.rope_parameters": [{"rope_type": "axial", "rope_theta": 30.0}],
}
REFUSED: dict[str, list[Any]] = {
    "text_config.hidden_act": ["gelu", "gelu_pytorch_tanh", "relu"],
    "text_config.use_sliding_window": [True],
    "text_config.layer_types": [["full_attention", "sliding_attention", "full_attention"]],
    "text_config.rope_parameters": [
        {**ROPE, "mrope_section": [2, 3, 4]},
        {**ROPE, "mrope_section": [4, 4]},
        {
            **{**ROPE, "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64},
            **{"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        },
    ],
    "quantization_config": [{"quant_method": "awq", "bits": 4}],
    "vision_config.hidden_size": [128],
    "vision_config.in_channels": [1],
    "vision_config.patch_size": [16, [14, 16]],
    "vision_config.spatial_merge_size": [4],
    "vision_config.temporal_patch_size": [1],
}
WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "image_token_id": (310, "names the placeholders, which the rows here have too"),
    "video_token_id": (311, "the same"),
    "vision_start_token_id": (290, "media are found by their placeholders"),
    "vision_end_token_id": (291, "the same"),
    "text_config.max_position_embeddings": (2048, "bounds a row's length at admission; no token depends on it"),
    "text_config.initializer_range": (0.5, "for new weights, which a checkpoint replaces"),
    "text_config.use_cache": (False, "speed only"),
    "text_config.sliding_window": (3, "unused unless use_sliding_window is true"),
    "text_config.max_window_layers": (1, "the same"),
    "text_config.attention_dropout": (0.9, "in training only"),
    "text_config.bos_token_id": (5, "the prompt is tokenized already"),
    "text_config.pad_token_id": (6, "packed rows have no padding"),
    "vision_config.initializer_range": (0.5, "for new weights"),
}
SECTIONS = ("text_config", "vision_config")


def changed_config(name: str, value: Any) -> Any:
    """make_config's with one field changed, and what has to change with it."""
    from transformers import Qwen2VLConfig

    values: dict[str, Any] = make_config().to_dict()
    if name == "text_config.use_sliding_window":
        values["text_config"] |= {"sliding_window": 4, "max_window_layers": 1}
    if name != "text_config.layer_types":
        del values["text_config"]["layer_types"]  # follows from the others
    if name == "text_config.hidden_size":
        values["vision_config"]["hidden_size"] = value
    if name in ("text_config.hidden_size", "text_config.num_attention_heads"):
        head_dim = {"text_config.hidden_size": 32, "text_config.num_attention_heads": 48}[name]
        values["text_config"]["rope_parameters"]["mrope_section"] = [head_dim // 2 - 10, 5, 5]
    *section, field = name.split(".")
    (values[section[0]] if section else values)[field] = value
    return Qwen2VLConfig(**values)


def rows_for(config: Any) -> list[Request]:
    """Text alone; an image and a video with text between. The same in every test, but for the placeholders."""
    rng = np.random.default_rng(7)
    media = [Medium("image", (1, 4, 6), rng.integers(0, 256, (24, 588), dtype=np.uint8))]
    media.append(Medium("video", (2, 4, 4), rng.integers(0, 256, (32, 1176), dtype=np.uint8)))
    ids = [IM_START]
    for medium, pad in zip(media, (config.image_token_id, config.video_token_id), strict=True):
        text = rng.integers(0, 280, 3).tolist()
        ids += [VISION_START, *[pad] * medium.num_visual_tokens, VISION_END, *text]
    text = [IM_START, *rng.integers(0, 280, 9).tolist()]
    sampling = SamplingParams(max_tokens=6)
    return [
        Request("text", np.asarray(text, dtype=np.int32), (), sampling),
        Request("media", np.asarray(ids, dtype=np.int32), tuple(media), sampling),
    ]


def answers(config: Any) -> list[tuple[int, ...]]:
    """The native engine's tokens, after checking that they are those of transformers alone."""
    model, rows = make_model(config=config), rows_for(config)
    expected = [plain_generate(model, row, clip_pixels)[0] for row in rows]
    ours = tokens_of(NativeEngine(from_model(model), EngineOptions("tiny", cache_gb=0.01)).generate(rows))
    assert ours == expected
    return ours


@cache
def unchanged_answers() -> list[tuple[int, ...]]:
    return answers(make_config())


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}-{n}") for name in table for n, value in enumerate(table[name])]


def test_every_field_of_the_three_configs_is_in_a_table() -> None:
    from transformers import PreTrainedConfig, Qwen2VLConfig

    config = Qwen2VLConfig()
    inherited = {field.name for field in fields(PreTrainedConfig)} | {"model_type", *SECTIONS}
    named = {field.name for field in fields(config)} - inherited
    for section in SECTIONS:
        part = getattr(config, section)
        named |= {f"{section}.{field.name}" for field in fields(part) if field.name not in inherited}
    known = {*HONOURED, *REFUSED, *WITHOUT_EFFECT}
    assert named - known == set(), "new fields of transformers: honour them, refuse them, or say why they do nothing"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), cases(HONOURED))
def test_a_honoured_field_gives_the_tokens_of_transformers(name: str, value: Any) -> None:
    if value == "an answer's token":
        value = unchanged_answers()[0][2]
    config = changed_config(name, value)
    check_supported(config, path="tiny", native=True)
    assert answers(config) != unchanged_answers(), "the change has no effect here, so nothing was tested"


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_a_field_that_the_engine_cannot_honour_is_refused(name: str, value: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"^tiny: config.json is not supported: .*, expected .*; use a checkpoint"
    ):
        check_supported(changed_config(name, value), path="tiny", native=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_field_without_effect_changes_no_token(name: str) -> None:
    config = changed_config(name, WITHOUT_EFFECT[name][0])
    check_supported(config, path="tiny", native=True)
    assert answers(config) == unchanged_answers()


def test_loading_refuses_before_it_reads_weights(tmp_path: Path) -> None:
    values = make_config().to_dict()
    values["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError, match=r"hidden_act of the text model is 'gelu', expected 'silu'; use a .* or set"
    ):
        load_engine(EngineOptions(str(tmp_path)))
    with pytest.raises(CheckpointError, match="can't load the weights"):  # transformers' own pass honours it
        load_engine(EngineOptions(str(tmp_path), kind="transformers"))
