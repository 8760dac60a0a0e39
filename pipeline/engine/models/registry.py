"""The model families that the engine runs."""

from __future__ import annotations

from pipeline.engine.models.architecture import Architecture
from pipeline.engine.models.qwen2_5_vl import QWEN2_5_VL
from pipeline.engine.models.qwen2_vl import QWEN2_VL
from pipeline.engine.models.qwen3_vl import QWEN3_VL

ARCHITECTURES: dict[str, Architecture] = {"qwen2_vl": QWEN2_VL, "qwen2_5_vl": QWEN2_5_VL, "qwen3_vl": QWEN3_VL}
"""By `model_type` of a checkpoint's config.json."""
