"""From options to an engine."""

from __future__ import annotations

from pipeline.engine.interface import Detokenize, Engine
from pipeline.engine.loading import Report, ignore, weights_reported
from pipeline.engine.settings import EngineOptions


def load_engine(options: EngineOptions, *, detokenize: Detokenize | None = None, report: Report = ignore) -> Engine:
    """Load the checkpoint and build the engine that `options.kind` names.

    `detokenize` turns token ids into text; only requests with stop strings need it. `report` takes texts
    on what is going on.
    """
    # Imported here, so that a job can be planned without torch and transformers.
    from pipeline.engine.weights import load_checkpoint

    report("reading weights")
    with weights_reported(report):
        checkpoint = load_checkpoint(options, report)
    report("warming up")
    if options.kind == "transformers":
        from pipeline.engine.reference import ReferenceEngine

        return ReferenceEngine(checkpoint, options, detokenize=detokenize)
    from pipeline.engine.engine import NativeEngine

    return NativeEngine(checkpoint, options, detokenize=detokenize)
