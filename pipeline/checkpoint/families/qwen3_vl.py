"""Qwen3-VL: patches of 16 pixels, bounds on all of a video's frames together, and a time before each temporal step."""

from __future__ import annotations

from pipeline.checkpoint.families.family import Family, Sampling

QWEN3_VL = Family(
    model_type="qwen3_vl",
    title="Qwen3-VL",
    patch_size=16,
    min_pixels=256 * 256,
    max_pixels=4096 * 4096,
    video_area="video",
    video_min_pixels=4096,
    video_max_pixels=25_165_824,
    video_total_pixels=None,
    frame_sampling="ends",
    video_prompt="timed steps",
    sampling=Sampling(temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.5),
    thinking_sampling=Sampling(temperature=1.0, top_k=20, top_p=0.95),
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)
