"""The arithmetic of Qwen-VL models against counts by hand, and the GPUs' names."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.demo import CHECKPOINT
from pipeline.planning.roofline import (
    SHAPES,
    Gpu,
    RowWork,
    cache_tokens,
    decode_bytes,
    decode_flops,
    find_gpu,
    min_gpus,
    named_shape,
    prefill_flops,
    row_flops,
    row_seconds,
    shape_of,
    vision_flops,
)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("2b", 2.209), ("7b", 8.291), ("72b", 73.404), ("qwen2.5-vl-3b", 3.755), ("qwen2.5-vl-7b", 8.292),
        ("qwen2.5-vl-32b", 33.453), ("qwen2.5-vl-72b", 73.411), ("qwen3-vl-2b", 2.128),
        ("qwen3-vl-4b", 4.438), ("qwen3-vl-8b", 8.767), ("qwen3-vl-32b", 33.357),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_published_checkpoints(name: str, billions: float) -> None:
    assert SHAPES[name].num_parameters == pytest.approx(billions * 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2-VL-7B-Instruct", "7b"), ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl-7b"),
        ("s3://b/qwen3-vl-32b", "qwen3-vl-32b"), ("Qwen/Qwen2.5-VL-32B-AWQ", "qwen2.5-vl-32b"),
        ("Qwen/Qwen9-VL-32B", None), ("me/my-model", None),
    ],
)  # fmt: skip
def test_a_published_checkpoint_is_known_by_its_name(path: str, name: str | None) -> None:
    assert named_shape(path) == (SHAPES[name] if name else None)


def test_the_documentation_states_the_published_sizes() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    stated = re.findall(r"^\| (Qwen[^|]*\d+B) \| ([\d.]+ GB) \| (\d+ kB) \|$", page, re.M)
    found = {name: sizes for names, *sizes in stated for name in names.split(", ")}
    expected = {
        f"Qwen/{name}": [f"{2 * shape.num_parameters / 1e9:.1f} GB", f"{shape.kv_bytes() / 1e3:.0f} kB"]
        for name in found
        if (shape := named_shape(f"Qwen/{name}")) is not None
    }
    assert {f"Qwen/{name}": sizes for name, sizes in found.items()} == expected and len(found) == len(SHAPES)


def test_shape_of_a_checkpoint_counts_its_weights() -> None:
    from safetensors import safe_open

    shape = shape_of(json.loads((CHECKPOINT / "config.json").read_text()))
    weights = 0
    for path in CHECKPOINT.glob("*.safetensors"):
        with safe_open(str(path), framework="np") as file:
            for key in file.keys():  # noqa: SIM118
                size = file.get_slice(key).get_shape()
                weights += math.prod(size) if len(size) > 1 else 0
    assert shape.num_parameters == weights


def test_flat_and_nested_configs_give_the_same_shape() -> None:
    text = {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    text |= {"intermediate_size": 8960, "vocab_size": 151936}
    vision = {"vision_config": {"embed_dim": 1280, "depth": 32, "num_heads": 16}, "tie_word_embeddings": True}
    assert shape_of({**text, **vision}) == shape_of({"text_config": text, **vision}) == SHAPES["2b"]


def test_the_newer_families_configs_give_their_shapes() -> None:
    text = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    text |= {"intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False}
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "hidden_act": "silu"}
    vision |= {"fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584, "patch_size": 14}
    assert shape_of({**text, "vision_config": vision}) == SHAPES["qwen2.5-vl-7b"]
    text = {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
    text |= {"intermediate_size": 9728, "vocab_size": 151936, "head_dim": 128}
    vision = {"depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "patch_size": 16}
    vision |= {"hidden_act": "gelu_pytorch_tanh", "num_position_embeddings": 2304}
    vision |= {"deepstack_visual_indexes": [5, 11, 17]}
    shape = shape_of({"text_config": text, "vision_config": vision, "tie_word_embeddings": True})
    assert shape == SHAPES["qwen3-vl-4b"] and shape.attention_width == 4096 and shape.kv_bytes() == 147_456


def test_windows_keep_the_towers_attention_small() -> None:
    shape = SHAPES["qwen2.5-vl-7b"]
    whole = replace(shape, windowed_layers=0)
    difference = vision_flops(whole, (2, 40, 40)) - vision_flops(shape, (2, 40, 40))
    assert difference == 2 * 4 * 1280 * 28 * 1600 * (1600 - 64)
    assert vision_flops(whole, (2, 8, 8)) == vision_flops(shape, (2, 8, 8))
    # Windows of 8 x 8, 8 x 4, 2 x 8 and 2 x 4 patches.
    difference = vision_flops(whole, (1, 10, 12)) - vision_flops(shape, (1, 10, 12))
    assert difference == 4 * 1280 * 28 * (120**2 - 64**2 - 32**2 - 16**2 - 8**2)


def test_flops_of_a_megapixel_image_on_2b() -> None:
    # 1036 x 1036 pixels are 74 x 74 patches and 1,369 visual tokens; 25 tokens of text, 100 of answer.
    shape = SHAPES["2b"]
    linear = 2 * 5476 * (32 * 12 * 1280**2 + 1176 * 1280) + 2 * 1369 * (5120**2 + 5120 * 1536)
    assert vision_flops(shape, (1, 74, 74)) == linear + 4 * 5476**2 * 1280 * 32
    assert prefill_flops(shape, 1394) == pytest.approx(3.82e12, rel=0.01)
    assert decode_flops(shape, 1394, 100) == pytest.approx(0.33e12, rel=0.01)
    row = RowWork([(1, 74, 74)], 1394, 100)
    assert sum(row_flops(shape, row)) == pytest.approx(16.06e12, rel=0.01)
    seconds = row_seconds(shape, Gpu("", 790e12, 4.3e12, 141), row, running=256)
    assert 1 / seconds == pytest.approx(47.3, rel=0.01)


def test_attention_of_a_video_stays_within_its_temporal_steps() -> None:
    shape = SHAPES["2b"]
    assert vision_flops(shape, (8, 20, 20)) == 8 * vision_flops(shape, (1, 20, 20))
    assert vision_flops(shape, (1, 40, 40)) > 4 * vision_flops(shape, (1, 20, 20))


def test_further_answers_cost_decoding_only() -> None:
    shape, gpu = SHAPES["2b"], find_gpu("H200")
    assert gpu is not None
    one, three = (row_seconds(shape, gpu, RowWork([], 1000, 100, n), running=64) for n in (1, 3))
    assert one < three < 3 * one


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("h100_pcie", "H100 PCIe"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("A100-80", "A100"), ("NVIDIA L40S", "L40S"), ("NVIDIA L40", "L40"), ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10G"), ("NVIDIA A10", "A10"), ("Tesla T4", "T4"), ("abacus", None),
    ],
)  # fmt: skip
def test_a_gpu_is_found_under_its_many_names(name: str, found: str | None) -> None:
    gpu = find_gpu(name)
    assert (gpu.name if gpu else None) == found


def test_weights_that_do_not_fit_leave_no_cache() -> None:
    h200 = find_gpu("H200")
    assert h200 is not None
    assert cache_tokens(SHAPES["72b"], h200, gpus=1, memory_fraction=0.9) == 0
    assert cache_tokens(SHAPES["72b"], h200, gpus=2, memory_fraction=0.9) > 100_000
    assert cache_tokens(SHAPES["2b"], h200, gpus=1, memory_fraction=0.9) > 4_000_000
    assert min_gpus(SHAPES["72b"], h200, cache_tokens=32_768, memory_fraction=0.9) == 2
    assert min_gpus(SHAPES["2b"], h200, cache_tokens=32_768, memory_fraction=0.9) == 1


def test_values_of_four_bytes_take_twice_the_memory() -> None:
    half, full = SHAPES["2b"], replace(SHAPES["2b"], bytes_per_value=4)
    assert full.kv_bytes() == 2 * half.kv_bytes()
    assert decode_bytes(full, 100, 10, 1) == 2 * decode_bytes(half, 100, 10, 1)
