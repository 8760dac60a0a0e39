"""CIDEr-D: agreement of a caption with several people's captions, where n-grams rare in the corpus weigh most.

Vedantam et al. 2015, https://arxiv.org/abs/1411.5726, as coco-caption computes it; our own because coco-caption
tokenizes with a Java program and holds the corpus in memory. An n-gram's weight depends on the references of all rows:
`Cider.add_references` for each of them, then `Cider.score` for each row. Knows strings only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from pipeline.evaluation.metrics.coco import MAX_ORDER, caption_tokens, count_ngrams

_SIGMA = 6.0
_log = lru_cache(maxsize=65_536)(math.log)


class Cider:
    """CIDEr-D with document frequencies: in how many rows' references each n-gram occurs.

    Memory is bounded: above `max_ngrams` those seen in a single row are dropped (lossy counting, Manku and Motwani
    2002). An n-gram of one row weighs the same as an unknown one, so only those dropped and met again lose a little.
    """

    def __init__(self, max_ngrams: int = 4_000_000, tokenize: Callable[[str], Sequence[str]] = caption_tokens) -> None:
        self.num_rows = 0
        self.frequencies: dict[str, int] = {}
        self._max_ngrams = max_ngrams
        self._tokenize = tokenize
        self._num_prunings = 0

    def add_references(self, references: Sequence[str]) -> None:
        """Counts one row's references."""
        self.num_rows += 1
        counts = self.frequencies
        ngrams = (count_ngrams(self._tokenize(reference)) for reference in references)
        for ngram in {ngram for orders in ngrams for order in orders for ngram in order}:
            counts[ngram] = counts.get(ngram, 0) + 1
        if len(counts) > self._max_ngrams:
            self._num_prunings += 1
            self.frequencies = {ngram: count for ngram, count in counts.items() if count > self._num_prunings}

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """CIDEr-D of one caption, 0 to 10: 10 times the mean over orders and references of the clipped cosine.

        Clipping and the Gaussian length penalty (sigma 6) are the "-D" of section 6 of the paper.
        """
        if not references:
            return 0.0
        candidate = self._vector(prediction)
        total = sum(_similarity(candidate, self._vector(reference)) for reference in references)
        return 10 * total / (MAX_ORDER * len(references))

    def _vector(self, text: str) -> _Vector:
        return _Vector(self._tokenize(text), self.frequencies, math.log(max(self.num_rows, 1)))


class _Vector:
    """Tf-idf of one text: for each order the weights and their norm, and the length."""

    def __init__(self, tokens: Sequence[str], frequencies: dict[str, int], log_rows: float) -> None:
        # Inverse document frequency: log of all rows over the rows that have the n-gram (at least one).
        self.weights = [
            {ngram: count * (log_rows - _log(frequencies.get(ngram) or 1)) for ngram, count in counts.items()}
            for counts in count_ngrams(tokens)
        ]
        self.norms = [math.sqrt(sum(weight * weight for weight in order.values())) for order in self.weights]
        # coco-caption measures length in bigrams; with two or more words the differences are the same as in words.
        self.length = max(len(tokens) - 1, 0)


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    total = 0.0
    for order in range(MAX_ORDER):
        expected = reference.weights[order]
        pairs = ((weight, expected.get(ngram)) for ngram, weight in candidate.weights[order].items())
        dot = sum(min(weight, other) * other for weight, other in pairs if other is not None)
        norms = candidate.norms[order] * reference.norms[order]
        total += dot / norms if norms else dot
    return total * math.exp(-((candidate.length - reference.length) ** 2) / (2 * _SIGMA**2))
