"""Which requests can be answered at all; the others become error completions before anything runs.

Plain integers and numpy; both engines apply the same rules.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pipeline.engine.models.mrope import PLAIN_POSITIONS, PositionRule, lay_out_prompt
from pipeline.engine.sequence import Request, Sequence
from pipeline.errors import GenerateError, PromptTooLong


@dataclass(frozen=True)
class AdmissionRules:
    vocab_size: int
    image_token_id: int
    video_token_id: int
    max_context: int
    """Prompt and output together."""
    cache_tokens: int | None = None
    """Tokens that the cache holds for one sample alone; None without a cache of our own."""
    can_detokenize: bool = False
    positions: PositionRule = PLAIN_POSITIONS
    patch_size: int = 14
    """Pixels of a patch's side."""

    def admit(self, request: Request) -> list[Sequence]:
        """A sequence for each sample. Raises GenerateError or PromptTooLong where the request can't be answered."""
        ids, sampling = request.input_ids, request.sampling
        if ids.ndim != 1 or len(ids) == 0:
            raise GenerateError(f"input_ids has shape {ids.shape}; expected one axis and at least one token")
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self.vocab_size:
            raise GenerateError(
                f"token ids range from {lowest} to {highest}; the checkpoint has {self.vocab_size} tokens"
            )
        if sampling.stop_strings and not self.can_detokenize:
            raise GenerateError("stop_strings need an engine that was given a detokenize function")
        check_length(
            len(ids),
            request.num_visual_tokens,
            sampling.max_tokens,
            max_context=self.max_context,
            cache_tokens=self.cache_tokens,
        )
        for medium in request.media:
            if medium.patch_size != self.patch_size:
                raise GenerateError(
                    f"the {medium.kind} has patches of {medium.patch_size} pixels a side; the checkpoint's have "
                    f"{self.patch_size}: preprocess with this checkpoint"
                )
        layout = lay_out_prompt(
            request, image_token_id=self.image_token_id, video_token_id=self.video_token_id, rule=self.positions
        )
        seed = random.getrandbits(63) if sampling.seed is None else sampling.seed
        return [Sequence(request, index, seed, layout) for index in range(sampling.n)]


def check_length(
    num_prompt_tokens: int, num_visual_tokens: int, max_tokens: int, *, max_context: int, cache_tokens: int | None
) -> None:
    """Raise PromptTooLong for a prompt and answer that can never fit the context or the cache."""
    length = num_prompt_tokens + max_tokens
    if length > max_context:
        limit, found = max_context, f"the model's context is {max_context} tokens"
        remedy = "use fewer or smaller media, or a smaller max_tokens"
    elif cache_tokens is not None and length > cache_tokens + 1:  # the last token chosen is never fed back
        limit, found = cache_tokens + 1, f"the key-value cache holds {cache_tokens} tokens"
        remedy = "give the cache more memory, or use fewer or smaller media"
    else:
        return
    raise PromptTooLong(
        f"the prompt has {num_prompt_tokens} tokens ({num_visual_tokens} of them visual) and max_tokens is "
        f"{max_tokens}, together {length}; {found}. A prompt of {max(0, limit - max_tokens)} tokens would fit: {remedy}"
    )
