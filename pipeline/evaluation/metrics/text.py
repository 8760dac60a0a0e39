"""Scores of a short answer against its references: match, token F1, ANLS, relaxed accuracy.

Each is a pure function `(prediction, references) -> float` from 0 to 1 that takes the best of several references.
Knows strings; not rows, files or what a task is.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_RELAXED_TOLERANCE = 0.05
_ANLS_THRESHOLD = 0.5


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference, apart from surrounding white space."""
    answer = prediction.strip()
    return float(any(answer == reference.strip() for reference in references))


def normalise_answer(text: str) -> str:
    """SQuAD's normal form: lower case, without punctuation and English articles, single spaces.

    Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250, the official evaluation script.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def normalised_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the normal forms are equal: SQuAD's "exact match" (Rajpurkar et al. 2016)."""
    return exact_match(normalise_answer(prediction), [normalise_answer(reference) for reference in references])


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the words of the normal forms: SQuAD's F1.

    Rajpurkar et al. 2016, section 4.4. If either side has no words, they must be equal (SQuAD 2.0's rule).
    """
    answer = normalise_answer(prediction).split()
    return max((_token_f1(answer, normalise_answer(reference).split()) for reference in references), default=0.0)


def _token_f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = (Counter(answer) & Counter(reference)).total()
    return 2 * shared / (len(answer) + len(reference))


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer: 1 - NL of the nearest reference, 0 if NL is above 0.5.

    Biten et al. 2019 (ST-VQA), https://arxiv.org/abs/1905.13648, equation 1 with threshold 0.5, as the DocVQA
    challenge's scorer computes it: exactly 0.5 counts; case and runs of white space do not count in the distance, but
    the length that divides it is that of the texts as they are.
    """
    from rapidfuzz.distance import Levenshtein  # of the extra `eval`: other metrics and jobs run without it

    answer, nearest = " ".join(prediction.lower().split()), 0.0
    for reference in references:
        length = max(len(prediction.upper()), len(reference.upper()))
        # The cutoff only saves time on long, wrong answers: beyond it the similarity is below the threshold.
        distance = Levenshtein.distance(answer, " ".join(reference.lower().split()), score_cutoff=length // 2)
        nearest = max(nearest, 1 - distance / length if length else 1.0)
    return nearest if nearest >= _ANLS_THRESHOLD else 0.0


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if a number is within 5 % of the reference number, or a text equals it in any case.

    Masry et al. 2022 (ChartQA), https://arxiv.org/abs/2203.10244, section 5.1, after Methani et al. 2020 (PlotQA), as
    pix2struct and the common harnesses compute it: "12%" is 0.12, "$5" and "1,000" are no numbers, and a reference of 0
    must be matched as text ("0.0" is not "0").
    """
    return float(any(_relaxed_match(prediction.strip(), reference.strip()) for reference in references))


def _relaxed_match(answer: str, reference: str) -> bool:
    found, expected = _number(answer), _number(reference)
    if found is None or not expected:  # a reference of 0 must be matched as text
        return answer.lower() == reference.lower()
    return abs(found - expected) / abs(expected) <= _RELAXED_TOLERANCE  # divided first, as in the published code


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
