"""From options to an engine."""

from __future__ import annotations

from pipeline.engine.interface import Detokenize, Engine
from pipeline.engine.settings import EngineOptions


def load_engine(options: EngineOptions, *, detokenize: Detokenize | None = None) -> Engine:
    """Load the checkpoint and build the engine that `options.kind` names.

    `detokenize` turns token ids into text; only requests with stop strings need it.
    """
    # Imported here, so that a job can be planned without torch and transformers.
    from pipeline.engine.weights import load_checkpoint

    checkpoint = load_checkpoint(options)
    if options.kind == "transformers":
        from pipeline.engine.reference import ReferenceEngine

        return ReferenceEngine(checkpoint, options, detokenize=detokenize)
    from pipeline.engine.engine import NativeEngine

    return NativeEngine(checkpoint, options, detokenize=detokenize)
