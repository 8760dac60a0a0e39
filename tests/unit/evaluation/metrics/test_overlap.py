"""BLEU, chrF, ROUGE-L and CIDEr: worked examples, sums of rows, and agreement with independent packages."""

from __future__ import annotations

import random

import numpy as np
import pytest
import sacrebleu
from pycocoevalcap.cider.cider import Cider as CocoCider

from pipeline.evaluation.metrics.cider import Cider
from pipeline.evaluation.metrics.coco import caption_tokens, coco_bleu, coco_rouge_l
from pipeline.evaluation.metrics.overlap import CorpusScore, bleu, chrf, rouge_l

NUM_PAIRS = 300
_WORDS = """
    a the red blue green cat dog sits runs on mat grass 3.5 1,000 it's don't well-known café ß 猫 (left) & &quot; end.
    ok, what? x/y naïve A The <b> 12-13
"""


def _pairs(max_references: int) -> tuple[list[str], list[list[str]]]:
    """Random sentences whose references share many words with them, and some empty ones."""
    rng, vocabulary = random.Random(max_references), _WORDS.split()
    predictions, references = [], []
    for row in range(NUM_PAIRS):
        words = rng.choices(vocabulary, k=rng.randint(0 if row % 50 == 0 else 1, 14))
        predictions.append(" ".join(words))
        row_references = []
        for _ in range(rng.randint(1, max_references)):
            changed = [word if rng.random() < 0.7 else rng.choice(vocabulary) for word in words]
            if rng.random() < 0.3:
                rng.shuffle(changed)
            row_references.append(" ".join(changed[: rng.randint(1, 14)]) or "mat")
        references.append(row_references)
    return predictions, references


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_sums_of_row_statistics_score_as_sacrebleu_scores_the_corpus(name: str) -> None:
    score: CorpusScore = {"bleu": bleu, "chrf": chrf}[name]
    predictions, references = _pairs(3)
    rows = np.array([score.statistics(*pair) for pair in zip(predictions, references, strict=True)], float)
    # sacrebleu takes the same number of references for every row: the first replaces missing ones.
    streams = [[row[number] if number < len(row) else row[0] for row in references] for number in range(3)]
    expected = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name](predictions, streams).score
    assert 100 * score.combine(rows.sum(axis=0)) == pytest.approx(expected)
    assert score.combine(np.stack([rows.sum(axis=0), 0 * rows[0]])) == pytest.approx([expected / 100, 0])
    sentence = {"bleu": sacrebleu.sentence_bleu, "chrf": sacrebleu.sentence_chrf}[name]
    for prediction, row in zip(predictions[:50], references, strict=False):
        assert 100 * score(prediction, row) == pytest.approx(sentence(prediction, row).score)


def test_bleu_of_papinenis_example_is_clipped() -> None:
    # "the" occurs seven times in the candidate, at most twice in a reference: 2/7 of its unigrams match.
    counts = bleu.statistics("the the the the the the the", ["the cat is on the mat", "there is a cat on the mat"])
    assert counts == [7, 7, 2, 0, 0, 0, 7, 6, 5, 4]


@pytest.mark.parametrize("score", [bleu, chrf, rouge_l, coco_rouge_l])
def test_overlap_is_one_for_equal_texts_and_zero_without_text_or_references(score: CorpusScore) -> None:
    assert score("a red cat sits", ["a dog", "a red cat sits"]) == pytest.approx(1)
    assert score("red cat", ["red cat"]) == pytest.approx(1), "shorter than the longest n-gram"
    assert score("", ["police"]) == score("police", []) == 0


def test_rouge_l_of_lins_example() -> None:
    # Lin 2004, section 3: LCS "police the gunman" of "police killed the gunman" and "police kill the gunman".
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(2 / 4)


def _cider_scores(predictions: list[str], references: list[list[str]], cider: Cider) -> list[float]:
    for row in references:
        cider.add_references(row)
    return [cider.score(prediction, row) for prediction, row in zip(predictions, references, strict=True)]


def test_cider_agrees_with_coco_caption() -> None:
    predictions, references = _pairs(5)
    corpus, rows = CocoCider().compute_score(
        dict(enumerate(references)), {row: [prediction] for row, prediction in enumerate(predictions)}
    )
    scores = _cider_scores(predictions, references, Cider(tokenize=str.split))
    assert scores == pytest.approx(list(rows), abs=1e-6)
    assert np.mean(scores) == pytest.approx(corpus, abs=1e-6)


def test_cider_rewards_rare_words_and_full_length() -> None:
    references = [["a red cat on a mat"], ["a blue dog on a lawn"], ["a green bird on a roof"]]
    perfect = _cider_scores(
        ["a red cat on a mat", "a blue dog on a lawn", "a green bird on a roof"], references, Cider()
    )
    assert perfect == pytest.approx([10, 10, 10])
    rare, common, repeated = _cider_scores(["red cat", "a on a", "red cat " * 12], references, Cider())
    assert rare > common, "words that every row has weigh nothing"
    assert repeated < 1
    assert Cider().score("red cat", []) == 0


# Tokens of stanford-corenlp 3.4.1 with coco-caption's options, without the punctuation that it removes.
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man's dog isn't at a well-known 5 p.m. show!", "a man 's dog is n't at a well-known 5 p.m. show"),
        ("(it’s) [a] “sign”: ‘STOP’...", "-lrb- it 's -rrb- -lsb- a -rsb- sign stop"),
        ("$5.00, 50% off #1 & more @ home", "$ 5.00 50 % off # 1 & more @ home"),
        ("Mr. Smith of the U.S. vs. St. Louis etc.", "mr. smith of the u.s. vs. st. louis etc."),
        ("He said no. No. 5 came on Jan. 3", "he said no no. 5 came on jan. 3"),
        ("It cannot be; I'm gonna go", "it can not be i 'm gon na go"),
        ("12:30pm, 1,000 people, 3-D, 1/2", "12:30 pm 1,000 people 3-d 1/2"),
        ("AT&T and black&white", "at&t and black & white"),
        ("rock 'n' roll in the '90s o'clock", "rock 'n' roll in the '90s o'clock"),
        ("wow!! what?! a -- b - c", "wow !! what ?! a b c"),
        ("me@example.com www.example.com t-shirt w/ logo", "me@example.com www.example.com t-shirt w / logo"),
    ],
)
def test_captions_are_tokenised_like_the_penn_treebank(text: str, tokens: str) -> None:
    assert caption_tokens(text) == tokens.split()


def test_coco_scores_of_worked_examples() -> None:
    # The recall of one reference and the precision of the other: 2 of 2 and 2 of 3; beta is 1.2.
    assert coco_rouge_l("a red cat", ["a cat", "blue"]) == pytest.approx((1 + 1.44) * 2 / 3 / (1 + 1.44 * 2 / 3))
    # Lengths of the prediction and the closer reference, shared n-grams, all n-grams; brevity exp(1 - 5/4).
    statistics = coco_bleu.statistics("a red cat sits.", ["a red cat sits here", "a"])
    assert statistics == [4, 5, 4, 3, 2, 1, 4, 3, 2, 1]
    assert coco_bleu.row_score(statistics) == pytest.approx(np.exp(1 - 5 / 4))
    assert coco_bleu("cat", ["dog"]) == pytest.approx(0, abs=1e-6)


def test_document_frequencies_stay_bounded_and_keep_what_is_frequent() -> None:
    cider = Cider(max_ngrams=2_000)
    for row in range(3_000):
        cider.add_references([f"a photo of thing{row} number{row}"])
    assert len(cider.frequencies) <= 2_000 + 20
    assert cider.num_rows == 3_000
    assert cider.frequencies["a photo of"] == 3_000
