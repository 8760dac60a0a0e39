"""Qwen2.5-VL: seen as Qwen2-VL is; its positions in time are seconds, which the engine gets beside the patches."""

from __future__ import annotations

from dataclasses import replace

from pipeline.checkpoint.families.family import Sampling
from pipeline.checkpoint.families.qwen2_vl import QWEN2_VL

QWEN2_5_VL = replace(QWEN2_VL, model_type="qwen2_5_vl", title="Qwen2.5-VL", sampling=Sampling(repetition_penalty=1.05))
