"""What an image and a video are to the model: the size of a patch, and the pixel bounds of a checkpoint's processor.

Knows `preprocessor_config.json`; not arrays. The engine stands alone and has a `PATCH_BYTES` and a `MERGE_SIZE` of its
own; a test compares them with these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint.locate import read_json
from pipeline.conversation import MediumKind
from pipeline.errors import CheckpointError

PATCH_SIZE = 14
"""Pixels of a patch's side."""
TEMPORAL_PATCH_SIZE = 2
"""Frames that make one temporal step."""
MERGE_SIZE = 2
"""Patches on each side of the block that becomes one visual token."""
PATCH_BYTES: dict[MediumKind, int] = {
    "image": 3 * PATCH_SIZE * PATCH_SIZE,
    "video": 3 * PATCH_SIZE * PATCH_SIZE * TEMPORAL_PATCH_SIZE,
}
"""Bytes of one patch. An image's two temporal halves are equal, so it has only one."""


@dataclass(frozen=True)
class ProcessorFacts:
    """Bounds on the area after resizing, in pixels, and the normalization. The defaults are the published values."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    video_min_pixels: int = 128 * 28 * 28
    video_max_pixels: int = 768 * 28 * 28
    image_mean: tuple[float, ...] | None = None
    """Of each channel; None where the checkpoint does not say: CLIP's, which are the engine's default."""
    image_std: tuple[float, ...] | None = None


def read_processor_facts(model_path: str, *, revision: str | None = None) -> ProcessorFacts:
    """Facts from `preprocessor_config.json` (images) and, if there is one, `video_preprocessor_config.json` (videos).

    Raises CheckpointError when the first is missing, or describes another family's patches.
    """
    image = read_json(model_path, "preprocessor_config.json", revision)
    if image is None:
        raise CheckpointError(
            f"can't find preprocessor_config.json in {model_path!r}: "
            "set model.path to a folder with a Qwen2-VL checkpoint or to a hub name"
        )
    geometry = {"patch_size": PATCH_SIZE, "temporal_patch_size": TEMPORAL_PATCH_SIZE, "merge_size": MERGE_SIZE}
    for name, expected in geometry.items():
        if image.get(name, expected) != expected:
            raise CheckpointError(f"{model_path!r} has {name} {image[name]}; Qwen2-VL has {expected}")
    video = read_json(model_path, "video_preprocessor_config.json", revision) or {}
    default = ProcessorFacts()
    return ProcessorFacts(
        *_bounds(image, default.min_pixels, default.max_pixels),
        *_bounds(video, default.video_min_pixels, default.video_max_pixels),
        image_mean=tuple(image["image_mean"]) if "image_mean" in image else None,
        image_std=tuple(image["image_std"]) if "image_std" in image else None,
    )


def _bounds(config: dict[str, Any], min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(min_pixels, max_pixels) in either spelling; `min_pixels` and `max_pixels` win, as they do in transformers."""
    size = config.get("size") or {}
    low = config.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or min_pixels
    high = config.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or max_pixels
    return int(low), int(high)
