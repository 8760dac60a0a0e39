"""The metrics by name: what a config may ask for, and how rows' scores become a run's score.

Knows the functions and their scales; not rows or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.evaluation.interval import Combine
from pipeline.evaluation.metrics import choice, overlap, text, vqa

RowScore = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True)
class Metric:
    """One score. A run's value is the mean of its rows' unless `counts` and `combine` say otherwise."""

    name: str
    title: str
    what: str
    """One sentence for the reader of a report."""
    score: RowScore | None = None
    """None for the two that need more than prediction and references, multiple choice and CIDEr."""
    counts: Callable[[str, Sequence[str]], overlap.Counts] | None = None
    combine: Combine | None = None
    """The corpus score of summed counts."""
    row_value: Combine | None = None
    """A row's score of its counts, where there are any."""
    num_counts: int = 1
    maximum: float = 1.0


_ALL = (
    Metric("exact_match", "Exact match", "The answer equals a reference.", text.exact_match),
    Metric(
        "normalised_match",
        "Normalised match",
        "The answer equals a reference but for case, punctuation and articles.",
        text.normalised_match,
    ),
    Metric("token_f1", "Token F1", "Words shared with the best reference (SQuAD's F1).", text.token_f1),
    Metric(
        "vqa_accuracy", "VQA accuracy", "Agreement with ten people: three who agree make it right.", vqa.vqa_accuracy
    ),
    Metric("anls", "ANLS", "Edit similarity to the nearest reference, 0 below one half.", text.anls),
    Metric(
        "relaxed_accuracy",
        "Relaxed accuracy",
        "Numbers within 5 % of the reference, other answers equal to it.",
        text.relaxed_accuracy,
    ),
    Metric("multiple_choice", "Multiple choice", "The chosen option is the right one."),
    Metric("open_answer", "Open answer", "The answer contains the reference (MMMU's rule).", choice.open_answer),
    Metric("rouge_l", "ROUGE-L", "Longest common subsequence of words, F1.", overlap.rouge_l),
    Metric(
        "bleu",
        "BLEU-4",
        "Shared n-grams of one to four words over the whole corpus.",
        overlap.bleu,
        overlap.bleu_counts,
        lambda sums: overlap.bleu_value(sums[..., :10]),
        lambda counts: overlap.bleu_value(counts, effective_order=True),
        10,
    ),
    Metric(
        "chrf",
        "chrF",
        "Shared n-grams of one to six characters over the whole corpus.",
        overlap.chrf,
        overlap.chrf_counts,
        lambda sums: overlap.chrf_value(sums[..., :18]),
        overlap.chrf_value,
        18,
    ),
    Metric("cider", "CIDEr-D", "Shared n-grams weighted by how telling they are; 10 at most.", maximum=10.0),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
