"""When a sample ends. Shared by both engines; plain Python over token ids.

Knows the checkpoint's end tokens and, for stop strings only, a function from token ids to text.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from pipeline.engine.sequence import Sequence
from pipeline.engine.settings import SamplingParams

# Repetition: a phrase of so many tokens at most, so many times and over so many tokens at least.
_MAX_PERIOD, _MIN_REPEATS, _MIN_SPAN = 64, 8, 32


@dataclass(frozen=True)
class StopRules:
    eos_token_ids: frozenset[int]
    detokenize: Callable[[SequenceOf[int]], str] | None = None

    def end_ids(self, sampling: SamplingParams) -> tuple[int, ...]:
        """Tokens that end an answer, and may not be chosen before `min_tokens`."""
        ends = frozenset(sampling.stop_token_ids)
        return tuple(sorted(ends if sampling.ignore_eos else ends | self.eos_token_ids))

    def append(self, sequence: Sequence, token: int, logprob: float | None = None) -> None:
        """Append the next token, and finish the sequence if that ends it."""
        sampling = sequence.sampling
        sequence.output_ids.append(token)
        if logprob is not None and sampling.logprobs:
            sequence.logprobs.append(logprob)
        if (token in self.eos_token_ids and not sampling.ignore_eos) or token in sampling.stop_token_ids:
            sequence.finish("stop", token)
        elif sampling.stop_strings and (found := self._find_stop_string(sequence)) is not None:
            sequence.finish("stop", *found)
        elif sampling.stop_on_repetition and repeats_endlessly(sequence.output_ids):
            sequence.finish("repetition")
        elif len(sequence.output_ids) >= sampling.max_tokens:
            sequence.finish("length")

    def _find_stop_string(self, sequence: Sequence) -> tuple[str, int] | None:
        """The stop string that the newest token completes, and how many characters lie from its start to the end."""
        sampling = sequence.sampling
        if len(sequence.output_ids) < sampling.min_tokens:
            return None
        assert self.detokenize is not None, "requests with stop strings are refused without detokenize"
        # A character takes up to four byte-tokens, so the newest match lies within this tail.
        tail = 4 * max(map(len, sampling.stop_strings)) + 8
        text = self.detokenize(sequence.output_ids[-tail:])
        # One that was complete before `min_tokens` lies in the tail too, but does not count.
        before = 0
        if sampling.min_tokens:
            # A character that the newest token completes does not count as text before it.
            before = len(self.detokenize(sequence.output_ids[-tail:-1]).rstrip("\ufffd"))
        found = [(text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in sampling.stop_strings]
        start, stop = min((each for each in found if each[0] >= 0), default=(-1, ""))
        return (stop, len(text) - start) if stop else None


def repeats_endlessly(token_ids: SequenceOf[int]) -> bool:
    """Whether the tokens end with one phrase, repeated as often and over as many tokens as stated above.

    Cheap enough to be asked after every token: only periods at which the last token occurred before are tried.
    """
    length = len(token_ids)
    for period in range(1, min(_MAX_PERIOD, length // _MIN_REPEATS) + 1):
        if token_ids[-1 - period] != token_ids[-1]:
            continue
        span = max(period * _MIN_REPEATS, _MIN_SPAN)
        if span <= length and all(token_ids[i] == token_ids[i + period] for i in range(length - span, length - period)):
            return True
    return False
