"""The shape of the demo model, and what it sees of pictures and clips.

The processors' settings and the chat template need no training: they are files in the checkpoint's folder, which are
read and copied from there. Knows numbers; not scenes, tokens' texts or training.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.families.qwen2_vl import QWEN2_VL
from pipeline.demo import CHECKPOINT
from pipeline.engine.sequence import MERGE_SIZE, TEMPORAL_PATCH_SIZE
from pipeline.preprocess.prompt import END_OF_TEXT, IMAGE_PAD, TURN_END, VIDEO_PAD, VISION_END, VISION_START

if TYPE_CHECKING:
    from transformers import Qwen2VLConfig

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
_IMAGE, _VIDEO = (json.loads((CHECKPOINT / name).read_text()) for name in PROCESSOR_FILES)
# 3 x 3 to 20 visual tokens a picture, 9 to 16 for each temporal step of a clip.
IMAGE_MIN_PIXELS, IMAGE_MAX_PIXELS = _IMAGE["min_pixels"], _IMAGE["max_pixels"]
VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = _VIDEO["min_pixels"], _VIDEO["max_pixels"]
VIDEO_FPS, VIDEO_MIN_FRAMES = _VIDEO["fps"], _VIDEO["min_frames"]


def model_config(vocab_size: int, token_ids: dict[str, int]) -> Qwen2VLConfig:
    """A Qwen2-VL of three million parameters; `token_ids` are those of the special tokens."""
    from transformers import Qwen2VLConfig

    ends = {
        "bos_token_id": token_ids[END_OF_TEXT],
        "eos_token_id": token_ids[TURN_END],
        "pad_token_id": token_ids[END_OF_TEXT],
    }
    return Qwen2VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.04,
            "rms_norm_eps": 1e-6,
            # With a theta of a million, the height and width axes, which have the slow frequencies, would hardly
            # react to a shift by one place.
            "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [4, 6, 6]},
            **ends,
        },
        vision_config={
            "depth": 3,
            "embed_dim": 128,
            "num_heads": 4,
            "mlp_ratio": 4,
            "hidden_size": 192,
            "patch_size": QWEN2_VL.patch_size,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "initializer_range": 0.04,
        },
        image_token_id=token_ids[IMAGE_PAD],
        video_token_id=token_ids[VIDEO_PAD],
        vision_start_token_id=token_ids[VISION_START],
        vision_end_token_id=token_ids[VISION_END],
        tie_word_embeddings=True,
        **ends,
    )


def generation_config(token_ids: dict[str, int]) -> dict[str, Any]:
    """`generation_config.json`: greedy, and both end tokens of the family."""
    return {
        "bos_token_id": token_ids[END_OF_TEXT],
        "eos_token_id": [token_ids[TURN_END], token_ids[END_OF_TEXT]],
        "pad_token_id": token_ids[END_OF_TEXT],
        "do_sample": False,
    }
