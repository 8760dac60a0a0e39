"""What a checkpoint's processor files say: which family it is of, its pixel bounds, its normalization.

Knows `config.json`, `processor_config.json`, `preprocessor_config.json` and `video_preprocessor_config.json`; not
arrays.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from pipeline.checkpoint.families.family import Family
from pipeline.checkpoint.locate import read_family, read_json
from pipeline.engine.sequence import MERGE_SIZE, TEMPORAL_PATCH_SIZE
from pipeline.errors import CheckpointError


def read_processor(model_path: str, *, revision: str | None = None) -> Family:
    """The checkpoint's family, with the bounds and the normalization that the checkpoint states.

    Raises CheckpointError when preprocessor_config.json is missing, or describes other patches than the family's.
    """
    family = read_family(model_path, revision=revision)
    # One file of both since transformers 5, and a file of each before; a checkpoint may have all of them.
    both = read_json(model_path, "processor_config.json", revision) or {}
    image = both.get("image_processor") or read_json(model_path, "preprocessor_config.json", revision)
    if image is None:
        raise CheckpointError(
            f"can't find preprocessor_config.json in {model_path!r}: "
            f"set model.path to a folder with a {family.title} checkpoint or to a hub name"
        )
    video = both.get("video_processor") or read_json(model_path, "video_preprocessor_config.json", revision) or {}
    mean, std = (tuple(image.get(name) or getattr(family, name)) for name in ("image_mean", "image_std"))
    expected = {
        "patch_size": family.patch_size,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    for config, (name, value) in itertools.product((image, video), expected.items()):
        if (found := config.get(name)) not in (None, value):
            why = f"{family.title} has" if name.endswith("size") else "its images have"
            raise CheckpointError(f"{model_path!r} has a processor with {name} {found}; {why} {value}")
    min_pixels, max_pixels = _bounds(image, family.min_pixels, family.max_pixels)
    video_min_pixels, video_max_pixels = _bounds(video, family.video_min_pixels, family.video_max_pixels)
    return replace(
        family,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        video_min_pixels=video_min_pixels,
        video_max_pixels=video_max_pixels,
        image_mean=mean,
        image_std=std,
    )


def _bounds(config: dict[str, Any], min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(min_pixels, max_pixels) in either spelling; `min_pixels` and `max_pixels` win, as they do in transformers."""
    size = config.get("size") or {}
    low = config.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or min_pixels
    high = config.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or max_pixels
    return int(low), int(high)
