"""Token ids and patches in, token ids out: continuous batching for Qwen2-VL.

Knows token ids, patches and blocks. Knows no text, no files beyond the checkpoint, and no Ray.
"""

from pipeline.engine.options import Detokenize, Engine, EngineOptions, load_engine
from pipeline.engine.sequence import Completion, FinishReason, Medium, Request, RequestId, SamplingParams

__all__ = [
    "Completion",
    "Detokenize",
    "Engine",
    "EngineOptions",
    "FinishReason",
    "Medium",
    "Request",
    "RequestId",
    "SamplingParams",
    "load_engine",
]
