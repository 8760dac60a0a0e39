"""Scores by shared n-grams and subsequences: BLEU-4 and chrF as sacrebleu, ROUGE-L as rouge-score computes them.

BLEU and chrF are scores of a corpus: rows give counts, counts add up, and the score is computed from the sums, so any
bootstrap sample of rows is scored without reading text again. Values are 0 to 1, where sacrebleu prints 0 to 100.
Both packages are of the extra `eval` and imported on first use, since other jobs run without them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class CorpusScore(ABC):
    """A score of a corpus: of one sentence by calling it, of a corpus by `combine` from summed `statistics`."""

    def __call__(self, prediction: str, references: Sequence[str]) -> float:
        return self.row_score(self.statistics(prediction, references)) if references else 0.0

    @abstractmethod
    def statistics(self, prediction: str, references: Sequence[str]) -> list[int]:
        """Counts of one row, to be added to those of other rows. There must be a reference."""

    @abstractmethod
    def combine(self, sums: Floats) -> Floats:
        """Corpus scores [...] from summed statistics [..., statistics]."""

    def row_score(self, statistics: Sequence[int]) -> float:
        """The sentence's score from its statistics."""
        return float(self.combine(np.asarray(statistics, np.float64)))


class SacreScore(CorpusScore):
    """A metric of sacrebleu.

    The two methods of sacrebleu used here start with an underscore, but all metrics of sacrebleu 2 implement them, for
    sacrebleu's own bootstrap.
    """

    def __init__(self, name: str, **sentence_options: bool) -> None:
        self._name = name
        self._sentence_options = sentence_options

    @cached_property
    def _corpus_metric(self) -> Any:
        import sacrebleu.metrics

        return getattr(sacrebleu.metrics, self._name)()

    @cached_property
    def _sentence_metric(self) -> Any:
        return type(self._corpus_metric)(**self._sentence_options)

    def statistics(self, prediction: str, references: Sequence[str]) -> list[int]:
        streams = [[reference] for reference in references]
        return list(self._corpus_metric._extract_corpus_statistics([prediction], streams)[0])

    def row_score(self, statistics: Sequence[int]) -> float:
        """Of a short sentence by its own orders."""
        return _share(self._sentence_metric, statistics)

    def combine(self, sums: Floats) -> Floats:
        rows = sums.reshape(-1, sums.shape[-1]).tolist()
        return np.array([_share(self._corpus_metric, row) for row in rows]).reshape(sums.shape[:-1])


def _share(metric: Any, statistics: Sequence[float]) -> float:
    # Rounding must not leave 1.0000000000000004 for a perfect match.
    return min(1.0, float(metric._compute_score_from_stats(list(statistics)).score / 100))


bleu = SacreScore("BLEU", effective_order=True)
"""BLEU-4 (Papineni et al. 2002): tokens of mteval-v13a, exponential smoothing; a short sentence by its own orders."""
chrf = SacreScore("CHRF")
"""chrF2 (Popović 2015, W15-3049): n-grams of one to six characters, recall counts twice as much as precision."""


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, without stemming: Lin 2004 (W04-1013). The best reference."""
    return float(_rouge_scorer().score_multi(references, prediction)["rougeL"].fmeasure) if references else 0.0


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])
