"""BLEU, chrF, ROUGE-L and CIDEr: worked examples, and agreement with independent packages on random pairs."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pipeline.evaluation.metrics.cider import DocumentFrequency, caption_tokens, cider_scores
from pipeline.evaluation.metrics.overlap import (
    bleu,
    bleu_counts,
    bleu_value,
    chrf,
    chrf_counts,
    chrf_value,
    longest_common_subsequence,
    rouge_l,
    tokenize_13a,
)

NUM_PAIRS = 1_000
_WORDS = """
    a the red blue green cat dog sits runs on mat grass 3.5 1,000 it's don't well-known café ß 猫 (left) & &quot; end.
    ok, what? x/y naïve A The <b> 12-13
"""


def _pairs(most_references: int) -> tuple[list[str], list[list[str]]]:
    """Random sentences whose references share many words with them, and some hopeless ones."""
    generator, words_known = random.Random(most_references), _WORDS.split()
    predictions, references = [], []
    for row in range(NUM_PAIRS):
        words = generator.choices(words_known, k=generator.randint(0 if row % 50 == 0 else 1, 14))
        predictions.append(" ".join(words))
        row_references = []
        for _ in range(generator.randint(1, most_references)):
            changed = [word if generator.random() < 0.7 else generator.choice(words_known) for word in words]
            if generator.random() < 0.3:
                generator.shuffle(changed)
            row_references.append(" ".join(changed[: generator.randint(1, 14)]) or "mat")
        references.append(row_references)
    return predictions, references


def _streams(references: list[list[str]]) -> list[list[str]]:
    """sacrebleu wants references by number, and as many for every row: the first stands in for missing ones."""
    most = max(map(len, references))
    return [[row[number] if number < len(row) else row[0] for row in references] for number in range(most)]


def test_bleu_agrees_with_sacrebleu_for_corpora_and_sentences() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="pip install sacrebleu to run this")
    predictions, references = _pairs(3)
    counts = np.array([bleu_counts(*pair) for pair in zip(predictions, references, strict=True)])
    corpus = sacrebleu.corpus_bleu(predictions, _streams(references)).score
    assert 100 * float(bleu_value(counts.sum(axis=0))) == pytest.approx(corpus, abs=1e-6)
    for prediction, row in zip(predictions, references, strict=True):
        expected = sacrebleu.sentence_bleu(prediction, row).score
        assert 100 * bleu(prediction, row) == pytest.approx(expected, abs=1e-6), (prediction, row)


def test_chrf_agrees_with_sacrebleu_for_corpora_and_sentences() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="pip install sacrebleu to run this")
    predictions, references = _pairs(2)
    counts = np.array([chrf_counts(*pair) for pair in zip(predictions, references, strict=True)])
    corpus = sacrebleu.corpus_chrf(predictions, _streams(references)).score
    assert 100 * float(chrf_value(counts.sum(axis=0))) == pytest.approx(corpus, abs=1e-6)
    for prediction, row in zip(predictions, references, strict=True):
        expected = sacrebleu.sentence_chrf(prediction, row).score
        assert 100 * chrf(prediction, row) == pytest.approx(expected, abs=1e-6), (prediction, row)


def test_rouge_l_agrees_with_the_rouge_score_package() -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="pip install rouge-score to run this")
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    for prediction, row in zip(*_pairs(3), strict=True):
        expected = scorer.score_multi(row, prediction)["rougeL"].fmeasure
        assert rouge_l(prediction, row) == pytest.approx(expected, abs=1e-6), (prediction, row)


def test_cider_agrees_with_coco_caption() -> None:
    cider_module = pytest.importorskip(
        "pycocoevalcap.cider.cider", reason="pip install pycocoevalcap --no-deps to run this"
    )
    predictions, references = _pairs(5)
    corpus, rows = cider_module.Cider().compute_score(
        dict(enumerate(references)), {row: [prediction] for row, prediction in enumerate(predictions)}
    )
    scores = cider_scores(predictions, references, tokenize=str.split)
    assert scores == pytest.approx(list(rows), abs=1e-6)
    assert np.mean(scores) == pytest.approx(corpus, abs=1e-6)


def test_bleu_of_papinenis_example_is_clipped() -> None:
    # "the" occurs seven times in the candidate, at most twice in a reference: 2/7 of its unigrams match.
    counts = bleu_counts("the the the the the the the", ["the cat is on the mat", "there is a cat on the mat"])
    assert counts.tolist() == [7, 7, 2, 0, 0, 0, 7, 6, 5, 4]


def test_bleu_counts_of_rows_add_up_to_the_corpus() -> None:
    assert float(bleu_value(np.zeros(10))) == 0
    perfect = bleu_counts("a red cat sits here", ["a red cat sits here"])
    assert float(bleu_value(perfect + perfect)) == pytest.approx(1)
    assert bleu_value(np.stack([perfect, 0 * perfect])).tolist() == pytest.approx([1, 0]), "many sums at once"


def test_tokens_13a_split_signs_but_not_numbers() -> None:
    assert tokenize_13a('He paid $1,000.50, "well-known" (3-4)!') == [
        *["He", "paid", "$", "1,000.50", ",", '"', "well-known", '"', "(", "3", "-", "4", ")", "!"],
    ]


def test_rouge_l_of_lins_example() -> None:
    # Lin 2004, section 3: LCS "police the gunman" of "police killed the gunman" and "police kill the gunman".
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(2 / 4)
    assert rouge_l("", ["police"]) == 0


def test_the_longest_common_subsequence_is_found_beyond_64_tokens() -> None:
    left = [str(number) for number in range(300)]
    assert longest_common_subsequence(left, left[::3]) == 100


def test_cider_rewards_telling_words_and_full_length() -> None:
    references = [["a red cat on a mat"], ["a blue dog on a lawn"], ["a green bird on a roof"]]
    perfect = cider_scores(["a red cat on a mat", "a blue dog on a lawn", "a green bird on a roof"], references)
    assert perfect == pytest.approx([10, 10, 10])
    telling, common, repeated = cider_scores(["red cat", "a on a", "red cat " * 12], references)
    assert telling > common, "words that every row has weigh nothing"
    assert repeated < 1


def test_captions_are_tokenised_like_the_penn_treebank_on_ordinary_text() -> None:
    assert caption_tokens("A man's dog isn't here, (it’s) at a well-known 5 p.m. show!") == [
        *["a", "man", "'s", "dog", "is", "n't", "here", "it", "'s", "at", "a", "well-known", "5", "p.m", "show"],
    ]


def test_document_frequencies_stay_bounded_and_keep_what_is_frequent() -> None:
    frequency = DocumentFrequency(max_ngrams=2_000)
    for row in range(3_000):
        frequency.add([f"a photo of thing{row} number{row}"])
    assert len(frequency.counts) <= 2_000 + 20
    assert frequency.num_rows == 3_000
    assert frequency.counts["a photo of"] == 3_000
