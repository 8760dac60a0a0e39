"""A tiny random Qwen2-VL with the real structure, and seeded requests for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from pipeline.engine import Completion, Medium, Request, SamplingParams

VOCAB = 320
ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD = range(300, 308)


def make_config() -> Any:
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        text_config={
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
        },
        vision_config={"depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 96},
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )


def make_model(*, seed: int = 0, dtype: torch.dtype = torch.float32, config: Any = None) -> Any:
    """Weights wide enough apart that answers differ from row to row and don't fall into one loop.

    With a config of the caller's, generation settings are those that transformers takes from it.
    """
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config or make_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.6 / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
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
    rng: np.random.Generator, kind: Literal["image", "video"], *, max_side: int = 6, max_steps: int = 4
) -> Medium:
    h, w = (2 * int(rng.integers(1, max_side // 2 + 1)) for _ in range(2))
    t = int(rng.integers(1, max_steps + 1)) if kind == "video" else 1
    patches = rng.integers(0, 256, (t * h * w, 588 if kind == "image" else 1176), dtype=np.uint8)
    return Medium(kind, (t, h, w), patches)


def make_request(
    request_id: int | str,
    rng: np.random.Generator,
    *,
    media: Sequence[Medium] = (),
    sampling: SamplingParams | None = None,
    max_text: int = 12,
) -> Request:
    """Chat-like: text, then each medium in its own vision marks with text after it."""

    def text() -> list[int]:
        return [int(i) for i in rng.integers(0, 300, int(rng.integers(1, max_text)))]

    ids = [IM_START, *text()]
    for medium in media:
        pad = IMAGE_PAD if medium.kind == "image" else VIDEO_PAD
        ids += [VISION_START, *([pad] * medium.num_visual_tokens), VISION_END, *text()]
    sampling = sampling or SamplingParams(max_tokens=int(rng.integers(1, 24)))
    return Request(request_id, np.asarray(ids, dtype=np.int32), tuple(media), sampling)


def mixed_requests(count: int, *, seed: int = 0) -> list[Request]:
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
            media.append(make_medium(rng, "image" if rng.random() < 0.7 else "video"))
            pool.append(media[-1])
        requests.append(make_request(request_id, rng, media=media))
    return requests


def tokens_of(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    assert all(completion.error is None for completion in completions), completions
    return [completion.token_ids for completion in completions]
