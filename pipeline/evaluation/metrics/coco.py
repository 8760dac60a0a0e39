"""Captions as coco-caption scores them: its tokens, BLEU-4 and ROUGE-L (Chen et al. 2015, https://arxiv.org/abs/1504.00325).

The tokens are those of the Stanford Penn Treebank tokenizer (Java) without punctuation, by rules of our own that need
no Java; docs/evaluation.md says how often they differ. CIDEr-D, the third score, is in `cider.py`. Knows strings only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.evaluation.metrics.overlap import CorpusScore, Floats

MAX_ORDER = 4
_BETA = 1.2  # of ROUGE-L: recall weighs more than precision

_CLITICS = re.compile(r"(?i)(?<=\w)(n't|'(?:s|re|ve|ll|d|m|n))\b")
_TOKENS = re.compile(
    r"""
      (?:https?://|www\.)[^\s"<>|()]*[^\s"<>|().,:;!?']
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | </?[a-z][^\s<>]*>
    | \b[a-z](?:\.[a-z])*\.(?![\w.])                                          # acronyms and initials
    | \b(?:mr|mrs|ms|dr|prof|gen|sen|rep|gov|lt|col|capt|sgt|st|mt|ft|jr|sr|ph\.d|inc|co|corp|ltd|bros|ave|blvd|rd|vs
        |al|etc)\.(?!\w)
    | \b(?:no|fig|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\.(?=\s*\d)
    | \bcan(?=not\b) | \bgon(?=na\b) | \bgot(?=ta\b) | \bwan(?=na\b) | \bgim(?=me\b) | \blem(?=me\b)
    | (?-i:\b[A-Z]{1,3}&[A-Z]{1,3}\b)                                         # AT&T
    | \by'(?=all\b) | '(?:em|til|cause|n')(?!\w) | '\d0s\b | 't(?=(?:is|was)\b) | \b(?:ma'am|cap'n|ol')(?!\w)
    | \b[a-z]'[a-z]{2,}
    | n't | '(?:s|re|ve|ll|d|m|n)\b
    | [+-]?(?<![\w-])\d+(?:[,.:/]\d+)+(?=[ap]m\b)
    | (?:(?<!\S)[+-])?\d+(?:[,.:/-]\d+)+\w*(?:-\w+)* | (?<!\S)[+-]\d+\w*
    | \bc(?:\+\+|\#)
    | (?<!\S)[@\#][a-z]\w*
    | \w+(?:[-./]\w+)*
    | [!?]{2,} | \*+
    | [^\w\s.,:;!?"'`\-–—…“”‘\U00010000-\U0010ffff]
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SPELLINGS = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"£": "#", "€": "$", "¢": "cents"},
}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&nbsp;": " ", "½": "1/2", "¼": "1/4", "¾": "3/4"}


def caption_tokens(text: str) -> list[str]:
    """Lower-case words without punctuation, clitics split off, as coco-caption's tokenizer writes them."""
    text = text.replace("’", "'")
    for entity, sign in _ENTITIES.items():
        text = text.replace(entity, sign)
    words = (found.lower() for found in _TOKENS.findall(_CLITICS.sub(r" \1", text)))
    return [_SPELLINGS.get(word, word) for word in words]


def count_ngrams(tokens: Sequence[str]) -> list[Counter[str]]:
    """One counter for each order 1 to 4; n-grams are words joined by single spaces."""
    longer = (zip(*(tokens[start:] for start in range(order)), strict=False) for order in range(2, MAX_ORDER + 1))
    return [Counter(tokens), *(Counter(map(" ".join, ngrams)) for ngrams in longer)]


class CocoBleu(CorpusScore):
    """BLEU-4 of coco-caption: the reference whose length is closest, and constants instead of smoothing."""

    def statistics(self, prediction: str, references: Sequence[str]) -> list[int]:
        """Lengths of prediction and closest reference; for each order the shared and all n-grams."""
        tokens = caption_tokens(prediction)
        others = [caption_tokens(reference) for reference in references]
        length = len(tokens)
        closest = min((abs(len(other) - length), len(other)) for other in others)[1]
        most = [Counter[str]() for _ in range(MAX_ORDER)]
        for other in others:
            most = [known | counts for known, counts in zip(most, count_ngrams(other), strict=True)]
        shared = [(counts & known).total() for counts, known in zip(count_ngrams(tokens), most, strict=True)]
        return [length, closest, *shared, *(max(0, length - order) for order in range(MAX_ORDER))]

    def combine(self, sums: Floats) -> Floats:
        """Corpus scores [...] from summed statistics [..., statistics]."""
        lengths, closest, shared, found = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
        precision = np.prod((shared + 1e-15) / (found + 1e-9), axis=-1) ** (1 / MAX_ORDER)
        ratio = (lengths + 1e-15) / (closest + 1e-9)
        scores: Floats = precision * np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1)
        return scores


coco_bleu = CocoBleu()


def coco_rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L of coco-caption: the best precision and the best recall of all references, recall 1.2 times as heavy."""
    tokens = caption_tokens(prediction) or [""]  # its split of an empty text gives one empty word
    others = [caption_tokens(reference) or [""] for reference in references]
    shared = [_longest_shared(tokens, other) for other in others]
    precision = max((count / len(tokens) for count in shared), default=0.0)
    recall = max((count / len(other) for count, other in zip(shared, others, strict=True)), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_shared(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for index, other in enumerate(right, 1):
            above = row[index]
            row[index] = diagonal + 1 if word == other else max(above, row[index - 1])
            diagonal = above
    return row[-1]
