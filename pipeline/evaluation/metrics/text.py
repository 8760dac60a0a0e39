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
    """1 where the prediction equals a reference, surrounding white space aside."""
    answer = prediction.strip()
    return float(any(answer == reference.strip() for reference in references))


def normalise_answer(text: str) -> str:
    """SQuAD's normal form: lower case, without punctuation and English articles, single spaces.

    Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250, the official evaluation script.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def normalised_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the normal forms are equal: SQuAD's "exact match" (Rajpurkar et al. 2016)."""
    answer = normalise_answer(prediction)
    return float(any(answer == normalise_answer(reference) for reference in references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the words of the normal forms: SQuAD's F1.

    Rajpurkar et al. 2016, section 4.4. Where either side has no words, equality decides (SQuAD 2.0's rule).
    """
    answer = normalise_answer(prediction).split()
    return max((_token_f1(answer, normalise_answer(reference).split()) for reference in references), default=0.0)


def _token_f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = (Counter(answer) & Counter(reference)).total()
    return 2 * shared / (len(answer) + len(reference))


def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance, by Myers' bit-parallel recurrence (J. ACM 46(3), 1999; Hyyrö's form, 2003).

    One integer of `len(left)` bits holds a whole column of the table, so that even pages of text cost little.
    """
    if left == right:
        return 0
    if len(left) > len(right):
        left, right = right, left
    if not left:
        return len(right)
    positions: dict[str, int] = {}
    for index, character in enumerate(left):
        positions[character] = positions.get(character, 0) | 1 << index
    everything, last = (1 << len(left)) - 1, 1 << (len(left) - 1)
    rises, falls, distance = everything, 0, len(left)  # vertical differences of +1 and -1 in the current column
    for character in right:
        equal = positions.get(character, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal
        right_rises = falls | (everything & ~(diagonal | rises))
        right_falls = rises & diagonal
        distance += (1 if right_rises & last else 0) - (1 if right_falls & last else 0)
        right_rises = right_rises << 1 | 1
        vertical = equal | falls
        rises = ((right_falls << 1) | ~(vertical | right_rises)) & everything
        falls = right_rises & vertical & everything
    return distance


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer: 1 - NL of the nearest reference, 0 from NL 0.5 on.

    Biten et al. 2019 (ST-VQA), https://arxiv.org/abs/1905.13648, equation 1 with threshold 0.5; as in the DocVQA
    challenge, letters' case and runs of white space do not count.
    """
    answer = " ".join(prediction.lower().split())
    best = 0.0
    for reference in references:
        expected = " ".join(reference.lower().split())
        longest = max(len(answer), len(expected))
        if longest == 0:
            return 1.0
        if abs(len(answer) - len(expected)) >= _ANLS_THRESHOLD * longest:
            continue  # the distance is at least the difference in length: saves the table for rambling answers
        similarity = 1 - edit_distance(answer, expected) / longest
        if similarity > 1 - _ANLS_THRESHOLD:
            best = max(best, similarity)
    return best


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 where a number is within 5 % of the reference number, or a text equals it whatever its case.

    Masry et al. 2022 (ChartQA), https://arxiv.org/abs/2203.10244, section 5.1, after Methani et al. 2020 (PlotQA).
    As in the common harnesses "12%" is 0.12, a reference of 0 must be met as text, and other text is compared in
    lower case; a thousands separator, a leading currency sign and a closing full stop are read here too.
    """
    return float(any(_relaxed_match(prediction.strip(), reference.strip()) for reference in references))


def _relaxed_match(answer: str, reference: str) -> bool:
    if answer.lower() == reference.lower():
        return True
    found, expected = _number(answer), _number(reference)
    if found is None or not expected:
        return found is not None and found == expected
    return abs(found - expected) <= _RELAXED_TOLERANCE * abs(expected)


_NUMBER = re.compile(r"[$€£]?([+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d+)?)(%?)\.?")


def _number(text: str) -> float | None:
    match = _NUMBER.fullmatch(text)
    if match is None or not any(character.isdecimal() for character in match[1]):
        return None
    try:
        value = float(match[1].replace(",", ""))
    except ValueError:  # an exponent without digits before it
        return None
    return value / 100 if match[2] else value
