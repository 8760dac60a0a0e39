"""Qwen2-VL: patches of 14 pixels, bounds on a frame's area, a video's tokens in one run."""

from __future__ import annotations

from pipeline.checkpoint.families.family import Family

QWEN2_VL = Family(
    model_type="qwen2_vl",
    title="Qwen2-VL",
    patch_size=14,
    min_pixels=56 * 56,
    max_pixels=28 * 28 * 1280,
    video_area="frame",
    video_min_pixels=128 * 28 * 28,
    video_max_pixels=768 * 28 * 28,
    video_total_pixels=int(128_000 * 28 * 28 * 0.9),
    frame_sampling="steps",
    video_prompt="one run",
)
