"""From options to an engine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.engine.interface import Detokenize, Engine
from pipeline.engine.settings import EngineOptions


def load_engine(
    options: EngineOptions,
    *,
    pixel_table: npt.NDArray[np.float32] | None = None,
    detokenize: Detokenize | None = None,
) -> Engine:
    """Load the checkpoint and build the engine `options.kind` names.

    `pixel_table` [3, 256] maps (channel, byte) to the normalized pixel value; None: CLIP's mean and standard deviation.
    `detokenize` turns token ids into text; only requests with stop strings need it.
    """
    # Imported here, so that a job can be planned without torch and transformers.
    from pipeline.engine.weights import load_checkpoint

    checkpoint = load_checkpoint(options)
    if options.kind == "transformers":
        from pipeline.engine.reference import ReferenceEngine

        return ReferenceEngine(checkpoint, options, pixel_table=pixel_table, detokenize=detokenize)
    from pipeline.engine.engine import NativeEngine

    return NativeEngine(checkpoint, options, pixel_table=pixel_table, detokenize=detokenize)
