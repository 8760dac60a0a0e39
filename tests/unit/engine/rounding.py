"""Where rounding may decide a greedy answer, and whether two answers differ only there."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.engine import EngineOptions, Request
from pipeline.engine.reference import ReferenceEngine, plain_generation_config
from pipeline.engine.weights import from_model


def next_logits(model: Any, request: Request, tokens: tuple[int, ...]) -> torch.Tensor:
    """transformers' logits [vocabulary] after the prompt and these output tokens, in float32."""
    engine = ReferenceEngine(from_model(model), EngineOptions("tiny"))
    sequence = engine.admission.admit(request)[0]
    with torch.inference_mode():
        out = model(**engine.inputs([sequence]), use_cache=True)
        if tokens:
            # After the prompt, as `generate` does it: an answer may contain a placeholder's id, which is no medium.
            stop = len(request.input_ids) + len(tokens)
            index = torch.arange(len(request.input_ids), stop, device=out.logits.device)
            out = model(
                input_ids=torch.tensor([tokens], device=index.device),
                position_ids=torch.stack([index, *[index + sequence.layout.delta] * 3])[:, None],
                attention_mask=torch.ones(1, stop, dtype=torch.int64, device=index.device),
                past_key_values=out.past_key_values,
            )
    logits: torch.Tensor = out.logits[0, -1].float().cpu()
    return logits


def smallest_margin(model: Any, request: Request) -> float:
    """The smallest lead, in logits, of a chosen token over the second in this row's greedy answer."""
    engine = ReferenceEngine(from_model(model), EngineOptions("tiny"))
    settings = plain_generation_config(
        max_new_tokens=request.sampling.max_tokens, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    with torch.inference_mode():
        answer = model.generate(**engine.inputs(engine.admission.admit(request)[:1]), generation_config=settings)
    first, second = torch.stack(answer.logits).float().topk(2).values.unbind(-1)
    return float((first - second).min())


def assert_rounding_explains(
    request: Request, ours: tuple[int, ...], theirs: tuple[int, ...], rounded: Any, exact: Any
) -> bool:
    """True where the answers differ. At the first difference, the float32 model (with the same weights) must then have
    the two tokens closer together than twice what rounding changes any logit there."""
    if ours == theirs:
        return False
    index = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    truth = next_logits(exact, request, ours[:index])
    noise = (next_logits(rounded, request, ours[:index]) - truth).abs().max()
    margin = (truth[ours[index]] - truth[theirs[index]]).abs()
    assert margin <= 2 * noise, f"token {index}: margin {margin:.4f}, but rounding moved logits by {noise:.4f}"
    return True
