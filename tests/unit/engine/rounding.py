"""Where rounding may decide a greedy answer, and whether two answers differ only there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.engine import EngineOptions, Request
from pipeline.engine.reference import ReferenceEngine, _plain_generation_config
from pipeline.engine.sequence import Sequence
from pipeline.engine.weights import from_model


def next_logits(model: Any, request: Request, tokens: tuple[int, ...]) -> torch.Tensor:
    """transformers' logits [vocabulary] after the prompt and these output tokens, in float32."""
    engine = ReferenceEngine(from_model(model), EngineOptions("tiny"))
    ids = np.concatenate([request.input_ids, np.asarray(tokens, dtype=np.int32)])
    request = replace(request, input_ids=ids)
    inputs = engine._inputs([(Sequence(request, 0, 0), engine.admission.lay_out(request))])
    with torch.inference_mode():
        logits: torch.Tensor = model(**inputs).logits[0, -1].float().cpu()
    return logits


def smallest_margin(model: Any, request: Request) -> float:
    """How far the winner was ahead of the second, in logits, where it was closest in this row's greedy answer."""
    engine = ReferenceEngine(from_model(model), EngineOptions("tiny"))
    settings = _plain_generation_config(
        max_new_tokens=request.sampling.max_tokens, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    with torch.inference_mode():
        answer = model.generate(
            **engine._inputs([(Sequence(request, 0, 0), engine.admission.lay_out(request))]), generation_config=settings
        )
    first, second = torch.stack(answer.logits).float().topk(2).values.unbind(-1)
    return float((first - second).min())


def assert_rounding_explains(
    request: Request, ours: tuple[int, ...], theirs: tuple[int, ...], rounded: Any, exact: Any
) -> bool:
    """True where the answers differ. Then, at the first difference, the float32 model (with the same weights) must
    hold the two tokens closer together than twice what rounding moved any logit of this very place."""
    if ours == theirs:
        return False
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    truth = next_logits(exact, request, ours[:place])
    noise = (next_logits(rounded, request, ours[:place]) - truth).abs().max()
    margin = (truth[ours[place]] - truth[theirs[place]]).abs()
    assert margin <= 2 * noise, f"token {place}: margin {margin:.4f}, but rounding moved logits by {noise:.4f}"
    return True
