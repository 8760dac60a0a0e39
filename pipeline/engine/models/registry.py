"""The model families that the engine runs."""

from __future__ import annotations

from pipeline.engine.models.architecture import Architecture
from pipeline.engine.models.qwen2_vl import QWEN2_VL

ARCHITECTURES: dict[str, Architecture] = {"qwen2_vl": QWEN2_VL}
"""By `model_type` of a checkpoint's config.json."""
