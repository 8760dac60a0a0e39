"""The model families that this pipeline runs: what an image, a video and a prompt are to each of them.

One file a family, plain data without torch. Their other half, the forward pass, is in engine/models/. Facts come from
transformers' processors and the published checkpoints.
"""

from __future__ import annotations

from pipeline.checkpoint.families.family import Family
from pipeline.checkpoint.families.qwen2_5_vl import QWEN2_5_VL
from pipeline.checkpoint.families.qwen2_vl import QWEN2_VL
from pipeline.checkpoint.families.qwen3_vl import QWEN3_VL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN2_VL, QWEN2_5_VL, QWEN3_VL)}
"""By `model_type` of a checkpoint's config.json."""
DEFAULT_FAMILY = QWEN2_VL
"""For looking at media where no checkpoint is at hand."""
