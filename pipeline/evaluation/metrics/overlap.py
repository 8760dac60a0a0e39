"""Scores by shared n-grams and subsequences: BLEU-4, chrF, ROUGE-L.

BLEU and chrF belong to a corpus: rows give integer counts, counts add up, and the score is computed from the sums.
So any group of rows, and any bootstrap sample of them, is scored without reading text again. Values are 0 to 1;
sacrebleu prints 100 times as much. Knows strings and counts; not rows or files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

_MAX_ORDER = 4
_CHAR_ORDER = 6
_BETA_SQUARED = 4.0  # chrF2: recall counts twice as much as precision

_SEPARATE = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),  # ASCII signs except . , - '
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),  # full stop and comma, unless between digits
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_SIGNS = re.compile(r"[!-&(-/:-@\[-`{-~]")
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def tokenize_13a(text: str) -> list[str]:
    """The tokens of WMT's mteval-v13a, sacrebleu's default (Post 2018, https://arxiv.org/abs/1804.08771)."""
    if _SIGNS.search(text) is None:  # most answers: nothing to separate
        return text.split()
    line = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    if "&" in line:
        for entity, sign in _ENTITIES:
            line = line.replace(entity, sign)
    line = f" {line} "
    for pattern, replacement in _SEPARATE:
        line = pattern.sub(replacement, line)
    return line.split()


def _word_ngrams(tokens: Sequence[str], max_order: int = _MAX_ORDER) -> Counter[tuple[str, ...]]:
    counts: Counter[tuple[str, ...]] = Counter()
    for order in range(1, max_order + 1):
        counts.update(zip(*(tokens[start:] for start in range(order)), strict=False))
    return counts


@lru_cache(maxsize=16_384)  # runs are compared over the same references, and image sets repeat theirs
def _bleu_reference(text: str) -> tuple[Counter[tuple[str, ...]], int]:
    tokens = tokenize_13a(text)
    return _word_ngrams(tokens), len(tokens)


def bleu_counts(prediction: str, references: Sequence[str]) -> Counts:
    """What BLEU-4 needs of one row: [length, nearest reference's length, 4 matches, 4 totals]."""
    tokens = tokenize_13a(prediction)
    known = [_bleu_reference(reference) for reference in references]
    # Of two reference lengths equally near the shorter counts, as in sacrebleu.
    nearest = min((length for _, length in known), key=lambda length: (abs(length - len(tokens)), length), default=0)
    matches, totals = [0] * _MAX_ORDER, [0] * _MAX_ORDER
    for ngram, count in _word_ngrams(tokens).items():
        order = len(ngram) - 1
        totals[order] += count
        # Clipped at the most often that any one reference has it.
        matches[order] += min(count, max((ngrams.get(ngram, 0) for ngrams, _ in known), default=0))
    return np.array([len(tokens), nearest, *matches, *totals], np.int64)


def bleu_value(counts: npt.NDArray[np.generic], effective_order: bool = False) -> Values:
    """BLEU-4 of summed counts [..., 10]: Papineni et al. 2002 with sacrebleu's exponential smoothing.

    `effective_order` leaves out orders longer than the text, as sacrebleu does for single sentences.
    """
    sums: Values = np.asarray(counts, np.float64)
    length, reference_length = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + _MAX_ORDER], sums[..., 2 + _MAX_ORDER :]
    present = np.minimum.accumulate(totals > 0, axis=-1)
    missed = present & (matches == 0)
    # The k-th order without a match counts as 1 / 2^k of a match.
    smoothed = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), matches)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(present, smoothed / totals, 0.0)
        logs = np.where(present, np.log(precisions), 0.0 if effective_order else -np.inf)
        orders = present.sum(axis=-1) if effective_order else float(_MAX_ORDER)
        brevity = np.where(length < reference_length, np.exp(1 - reference_length / length), 1.0)
        value = brevity * np.exp(logs.sum(axis=-1) / orders)
    return np.where((matches > 0).any(axis=-1) & (length > 0), value, 0.0)


def bleu(prediction: str, references: Sequence[str]) -> float:
    """BLEU-4 of one sentence, as `sacrebleu.sentence_bleu` has it (13a tokens, exponential smoothing), 0 to 1."""
    return float(bleu_value(bleu_counts(prediction, references), effective_order=True))


def _char_ngrams(text: str) -> list[Counter[str]]:
    joined = "".join(text.split())
    return [
        Counter(joined[start : start + order] for start in range(len(joined) - order + 1))
        for order in range(1, _CHAR_ORDER + 1)
    ]


@lru_cache(maxsize=4_096)
def _chrf_reference(text: str) -> list[Counter[str]]:
    return _char_ngrams(text)


def chrf_counts(prediction: str, references: Sequence[str]) -> Counts:
    """What chrF needs of one row: for each order 1 to 6 [n-grams, reference's n-grams, matches], the best reference."""
    found = _char_ngrams(prediction)
    best, best_value = np.zeros(3 * _CHAR_ORDER, np.int64), -1.0
    for reference in references:
        row: list[int] = []
        for mine, theirs in zip(found, _chrf_reference(reference), strict=True):
            matches = sum(min(count, theirs[ngram]) for ngram, count in mine.items() if ngram in theirs)
            row += [mine.total() if theirs else 0, theirs.total(), matches]
        counts = np.array(row, np.int64)
        value = float(chrf_value(counts))
        if value > best_value:
            best, best_value = counts, value
    return best


def chrf_value(counts: npt.NDArray[np.generic]) -> Values:
    """chrF2 of summed counts [..., 18]: Popović 2015 (W15-3049), six orders, without white space, as sacrebleu."""
    sums: Values = np.asarray(counts, np.float64)
    found, expected, matches = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    usable = (found > 0) & (expected > 0)
    orders = np.maximum(usable.sum(axis=-1), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(usable, matches / found, 0.0).sum(axis=-1) / orders
        recall = np.where(usable, matches / expected, 0.0).sum(axis=-1) / orders
        value = (1 + _BETA_SQUARED) * precision * recall / (_BETA_SQUARED * precision + recall)
    return np.where(precision + recall > 0, value, 0.0)


def chrf(prediction: str, references: Sequence[str]) -> float:
    """chrF2 of one sentence, as `sacrebleu.sentence_chrf` has it, 0 to 1."""
    return float(chrf_value(chrf_counts(prediction, references)))


_ROUGE_WORDS = re.compile(r"[a-z0-9]+")


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words: Lin 2004 (W04-1013), as the rouge-score package, no stemming."""
    answer = _ROUGE_WORDS.findall(prediction.lower())
    best = 0.0
    for reference in references:
        expected = _ROUGE_WORDS.findall(reference.lower())
        if answer and expected:
            shared = longest_common_subsequence(answer, expected)
            best = max(best, 2 * shared / (len(answer) + len(expected)))
    return best


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Its length, by Hyyrö's bit-parallel recurrence (2004): one integer holds a column of the table."""
    positions: dict[str, int] = {}
    for index, token in enumerate(left):
        positions[token] = positions.get(token, 0) | 1 << index
    everything = (1 << len(left)) - 1
    column = everything
    for token in right:
        matches = column & positions.get(token, 0)
        column = (column + matches | column - matches) & everything
    return len(left) - column.bit_count()
