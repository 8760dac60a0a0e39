"""Models of random weights: any family, in the sizes of its published checkpoints or in those that a CPU runs."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.checkpoint.families import FAMILIES
from pipeline.checkpoint.families.family import Family
from pipeline.engine.models.registry import ARCHITECTURES
from pipeline.planning.roofline import SHAPES as PUBLISHED
from pipeline.planning.roofline import ModelShape

IMAGE_PAD, VISION_START, VISION_END, VIDEO_PAD = 4, 5, 6, 7

# One of each family for dry runs and one that a CPU runs in seconds, beside those of the published checkpoints.
SHAPES = {
    "tiny": ModelShape(64, 2, 4, 2, 96, 4096, True, 32, 1, 2),
    "tiny-2.5": ModelShape(64, 2, 4, 2, 96, 4096, True, 32, 2, 2, None, 48, True, 1),
    "tiny-3": ModelShape(64, 2, 4, 2, 96, 4096, True, 32, 3, 2, 24, 64, False, 0, 2, 36, 16),
    "small": ModelShape(768, 12, 12, 2, 3072, 4096, True, 512, 8, 8),
    **PUBLISHED,
}
DEEP_BLOCKS = {24: (5, 11, 17), 27: (8, 16, 24)}
"""Blocks of Qwen3-VL's published towers, by their depth, whose features go to later layers of the decoder."""
PUBLISHED_HEAD_DIM = 128


def family_of(shape: ModelShape) -> Family:
    """The family whose tower has these parts."""
    return FAMILIES["qwen2_5_vl" if shape.vision_gated else "qwen3_vl" if shape.num_positions else "qwen2_vl"]


def make_config(shape: ModelShape) -> Any:
    """transformers' config of a model of this shape."""
    import transformers

    family = family_of(shape)
    architecture = ARCHITECTURES[family.model_type]
    height, width = (size * shape.head_dim // PUBLISHED_HEAD_DIM for size in architecture.mrope_section[1:])
    text: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [shape.head_dim // 2 - height - width, height, width],
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision: dict[str, Any] = {
        "depth": shape.vision_layers,
        "num_heads": shape.vision_heads,
        architecture.output_width: shape.hidden,
    }
    if family.model_type == "qwen2_vl":
        vision |= {"embed_dim": shape.vision_width}
    else:
        vision |= {"hidden_size": shape.vision_width, "intermediate_size": shape.vision_mlp}
    if family.model_type == "qwen2_5_vl":
        # The last block of every group attends within whole frames: 7, 15, 23 and 31 of 32.
        group = shape.vision_layers // (shape.vision_layers - shape.windowed_layers)
        vision |= {"fullatt_block_indexes": [*range(group - 1, shape.vision_layers, group)], "tokens_per_second": 2}
    if family.model_type == "qwen3_vl":
        text |= {"head_dim": shape.head_dim}
        text["rope_parameters"] |= {"mrope_interleaved": architecture.interleaved}
        deep = DEEP_BLOCKS.get(shape.vision_layers, range(shape.further_mergers))
        vision |= {"num_position_embeddings": shape.num_positions, "deepstack_visual_indexes": [*deep]}
    model_class = getattr(transformers, architecture.model_class)
    return model_class.config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=shape.tied,
    )


def make_model(shape: ModelShape, device: str, dtype: torch.dtype) -> Any:
    """transformers' model with random weights, made on the device."""
    import transformers

    config = make_config(shape)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return getattr(transformers, ARCHITECTURES[config.model_type].model_class)(config)
    finally:
        torch.set_default_dtype(default)
