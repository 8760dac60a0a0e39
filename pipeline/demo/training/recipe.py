"""The shape of the demo model and of what it sees: everything that the checkpoint's config files say.

Knows numbers; not scenes, tokens' texts or training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.processor import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE
from pipeline.engine.pixels import CLIP_MEAN, CLIP_STD
from pipeline.preprocess.prompt import END_OF_TEXT, IMAGE_PAD, TURN_END, VIDEO_PAD, VISION_END, VISION_START

if TYPE_CHECKING:
    from transformers import Qwen2VLConfig

# 3 x 3 to 20 visual tokens a picture, 9 to 16 for each temporal step of a clip.
IMAGE_MIN_PIXELS, IMAGE_MAX_PIXELS = 84 * 84, 112 * 140
VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = 84 * 84, 112 * 112
VIDEO_FPS = 2.0
VIDEO_MIN_FRAMES = 4


def model_config(vocab_size: int, token_ids: dict[str, int]) -> Qwen2VLConfig:
    """A Qwen2-VL of three million parameters; `token_ids` are those of the special tokens."""
    from transformers import Qwen2VLConfig

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
            # A theta of a million would leave the height and width axes, which have the slow frequencies, all but
            # blind to a shift by one place.
            "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": token_ids[END_OF_TEXT],
            "eos_token_id": token_ids[TURN_END],
            "pad_token_id": token_ids[END_OF_TEXT],
        },
        vision_config={
            "depth": 3,
            "embed_dim": 128,
            "num_heads": 4,
            "mlp_ratio": 4,
            "hidden_size": 192,
            "patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "initializer_range": 0.04,
        },
        image_token_id=token_ids[IMAGE_PAD],
        video_token_id=token_ids[VIDEO_PAD],
        vision_start_token_id=token_ids[VISION_START],
        vision_end_token_id=token_ids[VISION_END],
        bos_token_id=token_ids[END_OF_TEXT],
        eos_token_id=token_ids[TURN_END],
        pad_token_id=token_ids[END_OF_TEXT],
        tie_word_embeddings=True,
    )


def generation_config(token_ids: dict[str, int]) -> dict[str, Any]:
    """`generation_config.json`: greedy, and both end tokens of the family."""
    return {
        "bos_token_id": token_ids[END_OF_TEXT],
        "eos_token_id": [token_ids[TURN_END], token_ids[END_OF_TEXT]],
        "pad_token_id": token_ids[END_OF_TEXT],
        "do_sample": False,
    }


def image_processor_config() -> dict[str, Any]:
    """`preprocessor_config.json`, in the form published with the family."""
    return {
        "min_pixels": IMAGE_MIN_PIXELS,
        "max_pixels": IMAGE_MAX_PIXELS,
        "size": {"shortest_edge": IMAGE_MIN_PIXELS, "longest_edge": IMAGE_MAX_PIXELS},
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }


def video_processor_config() -> dict[str, Any]:
    """`video_preprocessor_config.json`: clips are seen smaller than pictures, two frames a second, at least four."""
    return {
        "size": {"shortest_edge": VIDEO_MIN_PIXELS, "longest_edge": VIDEO_MAX_PIXELS},
        "min_pixels": VIDEO_MIN_PIXELS,
        "max_pixels": VIDEO_MAX_PIXELS,
        "fps": VIDEO_FPS,
        "min_frames": VIDEO_MIN_FRAMES,
        "max_frames": 768,
        "do_sample_frames": True,
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "video_processor_type": "Qwen2VLVideoProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
