"""The metrics by name: what a config may ask for. To add a metric, add an entry here.

A metric is a function `(prediction, references) -> float`. A run's score is the mean of its rows' scores, except for a
`CorpusScore`, which is computed from summed statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from pipeline.errors import ConfigError
from pipeline.evaluation.metrics.choice import open_answer
from pipeline.evaluation.metrics.coco import coco_bleu, coco_rouge_l
from pipeline.evaluation.metrics.overlap import CorpusScore, bleu, chrf, rouge_l
from pipeline.evaluation.metrics.text import anls, exact_match, normalised_match, relaxed_accuracy, token_f1
from pipeline.evaluation.metrics.vqa import textvqa_accuracy, vqa_accuracy


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str
    title: str
    what: str
    """One sentence for the reader of a report."""
    score: Callable[[str, Sequence[str]], float] | None
    """None where a row's text and references are not enough: see `Scorer._row_scores`."""
    package: str | None = None
    """What `score` imports from the extra `eval`."""
    maximum: float = 1.0


_ALL = (
    Metric("exact_match", "Exact match", "The answer equals a reference.", exact_match),
    Metric("normalised_match", "Normalised match", "Equal but for case, punctuation and articles.", normalised_match),
    Metric("token_f1", "Token F1", "Words shared with the best reference (SQuAD's F1).", token_f1),
    Metric("vqa_accuracy", "VQA accuracy", "Agreement with ten people: three who agree make it right.", vqa_accuracy),
    Metric("textvqa_accuracy", "TextVQA accuracy", "The same, with mmf's normal form.", textvqa_accuracy),
    Metric("anls", "ANLS", "Edit similarity to the nearest reference, 0 below one half.", anls, "rapidfuzz"),
    Metric("relaxed_accuracy", "Relaxed accuracy", "Numbers within 5 %, other answers equal.", relaxed_accuracy),
    Metric("multiple_choice", "Multiple choice", "The chosen option is the right one.", None),
    Metric("open_answer", "Open answer", "The answer contains the reference (MMMU's rule).", open_answer),
    Metric("mmmu", "MMMU accuracy", "Multiple choice where a row has options, else MMMU's open answer.", None),
    Metric("rouge_l", "ROUGE-L (rouge-score)", "Longest common subsequence of words, F1.", rouge_l, "rouge_score"),
    Metric("bleu", "BLEU (sacrebleu)", "Shared n-grams of one to four words over the whole corpus.", bleu, "sacrebleu"),
    Metric("chrf", "chrF", "Shared n-grams of one to six characters over the whole corpus.", chrf, "sacrebleu"),
    Metric("coco_bleu", "BLEU-4 (COCO)", "Shared n-grams of one to four PTB tokens over the whole corpus.", coco_bleu),
    Metric("coco_rouge_l", "ROUGE-L (COCO)", "Longest common subsequence of PTB tokens.", coco_rouge_l),
    Metric(
        "cider",
        "CIDEr-D",
        "Shared n-grams, rare ones weigh more; 10 at most. The interval is about other rows, with these rows' weights.",
        None,
        maximum=10.0,
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def corpus_score(name: str) -> CorpusScore | None:
    """The metric's way from summed counts to a score; None for a metric that is a mean over rows."""
    score = METRICS[name].score
    return score if isinstance(score, CorpusScore) else None


def counts_column(name: str) -> str:
    """The column of the score rows with the counts behind a corpus score; the metric's own is of the single row."""
    return f"{name}_counts"


@cache
def require(package: str, purpose: str) -> None:
    """Raises ConfigError if a package of the extra `eval` is not installed."""
    if find_spec(package) is None:
        raise ConfigError(
            f"{purpose} needs the package {package}, which is not installed: pip install 'qwen2-vl-batch[eval]'"
        )
