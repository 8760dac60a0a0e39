"""Which requests can be answered at all; the rest become error completions before anything runs.

Plain integers and numpy; both engines ask the same questions.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.engine.models.mrope import lay_out_prompt
from pipeline.engine.sequence import PromptLayout, Request
from pipeline.errors import GenerateError, PromptTooLong


@dataclass(frozen=True)
class AdmissionRules:
    vocab_size: int
    image_token_id: int
    video_token_id: int
    max_context: int
    """Prompt and output together."""
    cache_tokens: int | None = None
    """Tokens the cache holds when one sample has it alone; None without a cache of our own."""
    can_detokenize: bool = False

    def lay_out(self, request: Request) -> PromptLayout:
        """The prompt's layout; GenerateError or PromptTooLong for one that can never be answered."""
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
        return lay_out_prompt(request, image_token_id=self.image_token_id, video_token_id=self.video_token_id)


def check_length(
    num_prompt_tokens: int, num_visual_tokens: int, max_tokens: int, *, max_context: int, cache_tokens: int | None
) -> None:
    """Raise PromptTooLong for a prompt and its answer that fit into the context or the cache under no circumstances."""
    length = num_prompt_tokens + max_tokens
    if length > max_context:
        raise PromptTooLong(
            f"the prompt has {num_prompt_tokens} tokens ({num_visual_tokens} of them visual) and max_tokens is "
            f"{max_tokens}, together {length}; the model's context is {max_context}. "
            f"A prompt of {max(0, max_context - max_tokens)} tokens would fit: use fewer or "
            "smaller media, or a smaller max_tokens"
        )
    # The last token chosen is never fed back, so it needs no place in the cache.
    if cache_tokens is not None and length - 1 > cache_tokens:
        raise PromptTooLong(
            f"the prompt has {num_prompt_tokens} tokens ({num_visual_tokens} of them visual) and max_tokens is "
            f"{max_tokens}; the key-value cache holds {cache_tokens} tokens. A prompt of "
            f"{max(0, cache_tokens - max_tokens + 1)} tokens would fit: give the cache more "
            "memory, or use fewer or smaller media"
        )
