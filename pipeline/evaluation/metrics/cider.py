"""CIDEr-D: agreement of a caption with a crowd's captions, weighted by how telling each n-gram is in the corpus.

Vedantam et al. 2015, https://arxiv.org/abs/1411.5726, as coco-caption computes it. An n-gram's weight needs the whole
corpus of references first: `DocumentFrequency.add` every row, then `cider` each row. Knows strings only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

_MAX_ORDER = 4
_SIGMA = 6.0

Tokenizer = Callable[[str], list[str]]

_CLITICS = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_WORDS = re.compile(r"n't|'(?:s|re|ve|ll|d|m)\b|\w+(?:[-./]\w+)*")


def caption_tokens(text: str) -> list[str]:
    """Lower-case words without punctuation, clitics split off.

    Stands for the Penn Treebank tokenizer (Java) of coco-caption: equal on ordinary captions, not on every string.
    """
    return _WORDS.findall(_CLITICS.sub(r" \1", text.lower().replace("’", "'")))


def _ngrams_of(tokens: Sequence[str], order: int) -> Counter[str]:
    """Counts of the n-grams of so many words, keyed by the words joined with single spaces."""
    if order == 1:
        return Counter(tokens)
    return Counter(map(" ".join, zip(*(tokens[start:] for start in range(order)), strict=False)))


def _ngrams(tokens: Sequence[str]) -> set[str]:
    """All n-grams of one to four words."""
    return set().union(*(_ngrams_of(tokens, order) for order in range(1, _MAX_ORDER + 1)))


class DocumentFrequency:
    """In how many rows' references each n-gram occurs.

    Memory is bounded: above `max_ngrams` those seen in a single row are dropped (lossy counting, Manku and Motwani
    2002). An n-gram of one row weighs the same as an unknown one, so only those dropped and met again lose a little.
    """

    def __init__(self, max_ngrams: int = 4_000_000) -> None:
        self.num_rows = 0
        self.counts: dict[str, int] = {}
        self.max_ngrams = max_ngrams
        self.prunings = 0

    def add(self, references: Sequence[str], tokenize: Tokenizer = caption_tokens) -> None:
        self.num_rows += 1
        counts = self.counts
        for ngram in {ngram for reference in references for ngram in _ngrams(tokenize(reference))}:
            counts[ngram] = counts.get(ngram, 0) + 1
        if len(counts) > self.max_ngrams:
            least = self.prunings + 1
            self.counts = {ngram: count for ngram, count in counts.items() if count > least}
            self.prunings = least

    @property
    def log_rows(self) -> float:
        """The weight of an n-gram that at most one row has."""
        return math.log(max(self.num_rows, 1))


@lru_cache(maxsize=65_536)
def _log(count: int) -> float:
    return math.log(count)


class _Vector:
    """Tf-idf of one text: for each order the weights and their norm, and the length."""

    def __init__(self, tokens: Sequence[str], frequency: DocumentFrequency) -> None:
        self.weights: list[dict[str, float]] = []
        log_rows, known = frequency.log_rows, frequency.counts
        for order in range(1, _MAX_ORDER + 1):
            counts = _ngrams_of(tokens, order)
            # Inverse document frequency: log of all rows over the rows that have it (at least one).
            self.weights.append(
                {ngram: count * (log_rows - _log(known.get(ngram) or 1)) for ngram, count in counts.items()}
            )
        self.norms = [math.sqrt(sum(weight * weight for weight in order.values())) for order in self.weights]
        # coco-caption measures length in bigrams; with two or more words the differences are the same as in words.
        self.length = max(len(tokens) - 1, 0)


def cider(
    prediction: str,
    references: Sequence[str],
    frequency: DocumentFrequency,
    tokenize: Tokenizer = caption_tokens,
) -> float:
    """CIDEr-D of one caption, 0 to 10: 10 times the mean over orders and references of the clipped cosine.

    Clipping and the Gaussian length penalty (sigma 6) are the "-D" of section 6 of the paper.
    """
    if not references:
        return 0.0
    candidate = _Vector(tokenize(prediction), frequency)
    total = sum(_similarity(candidate, _Vector(tokenize(reference), frequency)) for reference in references)
    return 10 * total / (_MAX_ORDER * len(references))


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    total = 0.0
    for order in range(_MAX_ORDER):
        mine, theirs = candidate.weights[order], reference.weights[order]
        dot = 0.0
        for ngram, weight in mine.items():
            other = theirs.get(ngram)
            if other is not None:
                dot += min(weight, other) * other
        norms = candidate.norms[order] * reference.norms[order]
        total += dot / norms if norms else dot
    return total * math.exp(-((candidate.length - reference.length) ** 2) / (2 * _SIGMA**2))


def cider_scores(
    predictions: Iterable[str], references: Sequence[Sequence[str]], tokenize: Tokenizer = caption_tokens
) -> list[float]:
    """CIDEr-D of each caption, with document frequencies over these same references. The corpus score is the mean."""
    frequency = DocumentFrequency()
    for row in references:
        frequency.add(row, tokenize)
    return [
        cider(prediction, row, frequency, tokenize) for prediction, row in zip(predictions, references, strict=True)
    ]
