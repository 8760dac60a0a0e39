"""Tiny random models with the real structure of each family, and seeded requests for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from pipeline.engine import Completion, Medium, Request, SamplingParams
from pipeline.engine.models.registry import ARCHITECTURES
from pipeline.engine.sequence import patch_bytes

VOCAB = 320
ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD = range(300, 308)


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    "bos_token_id": ENDOFTEXT,
    "eos_token_id": IM_END,
    "pad_token_id": ENDOFTEXT,
}
TOWER = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 112, "out_hidden_size": 96}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": (
        "Qwen2VL",
        {"vision_config": {"depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 96}},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {"vision_config": {**TOWER, "depth": 4, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2}},
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "text_config": {
                # A head_dim of its own, and frequencies that follow time where the other axes have run out.
                "head_dim": 24,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [6, 3, 3],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {**TOWER, "depth": 4, "num_position_embeddings": 36, "deepstack_visual_indexes": [1, 2]},
        },
    ),
}
"""transformers' prefix, and what a tiny config of each family has besides TEXT."""


def make_config(family: str = "qwen2_vl", **changes: Any) -> Any:
    import transformers

    prefix, own = FAMILIES[family]
    values = {
        "text_config": {**TEXT, **own.get("text_config", {})},
        "vision_config": dict(own["vision_config"]),
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": True,
    }
    for name, value in changes.items():
        if isinstance(values.get(name), dict):
            values[name] |= value
        else:
            values[name] = value
    return getattr(transformers, f"{prefix}Config")(**values)


def make_model(*, seed: int = 0, dtype: torch.dtype = torch.float32, config: Any = None) -> Any:
    """Weights wide enough apart that answers differ from row to row and don't fall into one loop.

    With a config of the caller's, generation settings are those that transformers takes from it.
    """
    import transformers

    torch.manual_seed(seed)
    made = config or make_config()
    model = getattr(transformers, ARCHITECTURES[made.model_type].model_class)(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.6 / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif "q_norm" in name or "k_norm" in name:
                parameter.normal_(1.0, 0.3)
        model.model.language_model.embed_tokens.weight.normal_(0.0, 0.3)
    if config is None:
        model.generation_config.eos_token_id = [IM_END, ENDOFTEXT]
        model.generation_config.pad_token_id = ENDOFTEXT
    # A checkpoint loaded in bfloat16 keeps its rotary frequencies in float32; `to` alone would round them.
    frequencies = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    kept = {name: buffer.clone() for name, buffer in frequencies.items()}
    model = model.to(dtype).eval()
    for name, buffer in kept.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer)
    return model


def make_medium(
    rng: np.random.Generator,
    kind: Literal["image", "video"],
    *,
    max_side: int = 6,
    max_steps: int = 4,
    family: str = "qwen2_vl",
) -> Medium:
    h, w = (2 * int(rng.integers(1, max_side // 2 + 1)) for _ in range(2))
    t = int(rng.integers(1, max_steps + 1)) if kind == "video" else 1
    num_bytes = patch_bytes(kind, ARCHITECTURES[family].patch_size)
    patches = rng.integers(0, 256, (t * h * w, num_bytes), dtype=np.uint8)
    seconds = float(rng.choice([0.4, 1.0, 1.9])) if family == "qwen2_5_vl" and kind == "video" else 1.0
    return Medium(kind, (t, h, w), patches, seconds)


def make_request(
    request_id: int | str,
    rng: np.random.Generator,
    *,
    media: Sequence[Medium] = (),
    sampling: SamplingParams | None = None,
    max_text: int = 12,
    family: str = "qwen2_vl",
) -> Request:
    """Chat-like: text, then each medium in its own vision marks with text after it."""
    separate = family == "qwen3_vl"

    def text() -> list[int]:
        return [int(i) for i in rng.integers(0, 300, int(rng.integers(1, max_text)))]

    ids = [IM_START, *text()]
    for medium in media:
        pad = IMAGE_PAD if medium.kind == "image" else VIDEO_PAD
        if separate and medium.kind == "video":
            for _ in range(medium.grid_thw[0]):
                pads = [pad] * (medium.num_visual_tokens // medium.grid_thw[0])
                ids += [*text(), VISION_START, *pads, VISION_END]
            continue
        ids += [VISION_START, *([pad] * medium.num_visual_tokens), VISION_END, *text()]
    sampling = sampling or SamplingParams(max_tokens=int(rng.integers(1, 24)))
    return Request(request_id, np.asarray(ids, dtype=np.int32), tuple(media), sampling)


def mixed_requests(count: int, *, seed: int = 0, family: str = "qwen2_vl") -> list[Request]:
    """Text, images, videos, and up to five media a row, mixed; some rows share a medium."""
    rng = np.random.default_rng(seed)
    requests: list[Request] = []
    pool: list[Medium] = []
    for request_id in range(count):
        media: list[Medium] = []
        for _ in range(int(rng.choice([0, 1, 1, 1, 2, 3, 5]))):
            if pool and rng.random() < 0.15:
                media.append(pool[int(rng.integers(len(pool)))])
                continue
            # Of 2 to 12 patches a side where a frame has windows of 8, so that some have one and some have several.
            max_side = 12 if family == "qwen2_5_vl" else 6
            kind: Literal["image", "video"] = "image" if rng.random() < 0.7 else "video"
            media.append(make_medium(rng, kind, max_side=max_side, family=family))
            pool.append(media[-1])
        requests.append(make_request(request_id, rng, media=media, family=family))
    return requests


def tokens_of(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    assert all(completion.error is None for completion in completions), completions
    return [completion.token_ids for completion in completions]
