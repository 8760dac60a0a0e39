"""Our scores against the packages that papers use, on drawn pairs. test_lmms_eval_scorers has those of the sets."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

from pipeline.evaluation.interval import Tally, wilson_interval
from pipeline.evaluation.metrics.cider import Cider
from pipeline.evaluation.metrics.coco import caption_tokens, coco_bleu, coco_rouge_l
from pipeline.evaluation.metrics.overlap import bleu, chrf, rouge_l
from pipeline.evaluation.metrics.text import anls, normalised_match, token_f1
from pipeline.evaluation.paired import compare, permutation_p_value, sign_p_value

NUM_PAIRS = 1_000
INSTALL = "pip install 'qwen2-vl-batch[dev]' to run this"
_PLAIN = """
    a the man woman children red blue cat dog sits standing on in with holding street kitchen and near two people's
    well-known t-shirt café
"""
_SIGNS = """
    man, woman. "red" (blue) cat's isn't 5 p.m. $5 50% black & white U.S. Mr. St. street! it's 1,000 10:30 12:30pm
    and/or #1 [sign] 'STOP' 3-D cannot gonna who're o'clock AT&T what?! no. etc. -- - ...
"""


def _pairs(
    vocabulary: str, num_pairs: int = NUM_PAIRS, seed: int = 0, longest: int = 14
) -> tuple[list[str], list[list[str]]]:
    """Sentences, and three references of each that share most of its words."""
    rng, words = random.Random(seed), vocabulary.split()
    predictions, references = [], []
    for _ in range(num_pairs):
        drawn = rng.choices(words, k=rng.randint(1, longest))

        def near(drawn: Sequence[str] = drawn) -> str:
            changed = [word if rng.random() < 0.7 else rng.choice(words) for word in drawn]
            return " ".join(changed[: rng.randint(1, longest)])

        predictions.append(near())
        references.append([near() for _ in range(3)])
    return predictions, references


def _corpus_score(score: object, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    rows = [score.statistics(*pair) for pair in zip(predictions, references, strict=True)]  # type: ignore[attr-defined]
    return float(score.combine(np.array(rows, float).sum(axis=0)))  # type: ignore[attr-defined]


@pytest.mark.parametrize("vocabulary", [_PLAIN, _PLAIN + _SIGNS])
def test_bleu_and_chrf_are_sacrebleus_and_rouge_l_is_rouge_scores(vocabulary: str) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason=INSTALL)
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason=INSTALL).RougeScorer(["rougeL"])
    predictions, references = _pairs(vocabulary)
    streams = list(zip(*references, strict=True))
    for score, official in ((bleu, sacrebleu.corpus_bleu), (chrf, sacrebleu.corpus_chrf)):
        expected = official(predictions, streams).score
        assert 100 * _corpus_score(score, predictions, references) == pytest.approx(expected)
    for prediction, row in zip(predictions, references, strict=True):
        assert rouge_l(prediction, row) == scorer.score_multi(row, prediction)["rougeL"].fmeasure


def _coco_caption(tokens: Sequence[str], reference_tokens: Sequence[Sequence[str]]) -> tuple[float, list[float], float]:
    """BLEU-4, ROUGE-L of each row and CIDEr-D of tokenised texts."""
    bleu_scorer = pytest.importorskip("pycocoevalcap.bleu.bleu", reason=INSTALL).Bleu(4)
    rouge_scorer = pytest.importorskip("pycocoevalcap.rouge.rouge", reason=INSTALL).Rouge()
    cider_scorer = pytest.importorskip("pycocoevalcap.cider.cider", reason=INSTALL).Cider()
    expected, found = dict(enumerate(map(list, reference_tokens))), {row: [text] for row, text in enumerate(tokens)}
    bleus, _ = bleu_scorer.compute_score(expected, found, verbose=0)
    _, rouges = rouge_scorer.compute_score(expected, found)
    cider, _ = cider_scorer.compute_score(expected, found)
    return bleus[3], list(rouges), cider


def _cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    cider = Cider()
    for row in references:
        cider.add_references(row)
    return float(np.mean([cider.score(*pair) for pair in zip(predictions, references, strict=True)]))


@pytest.mark.parametrize("vocabulary", [_PLAIN, _PLAIN + _SIGNS])
def test_caption_scores_of_the_same_tokens_are_coco_captions(vocabulary: str) -> None:
    predictions, references = _pairs(vocabulary)
    tokens = [" ".join(caption_tokens(text)) for text in predictions]
    bleu_4, rouges, cider = _coco_caption(
        tokens, [[" ".join(caption_tokens(text)) for text in row] for row in references]
    )
    assert _corpus_score(coco_bleu, predictions, references) == pytest.approx(bleu_4)
    assert [coco_rouge_l(*pair) for pair in zip(predictions, references, strict=True)] == pytest.approx(rouges)
    assert _cider(predictions, references) == pytest.approx(cider)


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java: apt-get install default-jre-headless")
@pytest.mark.parametrize("vocabulary", [_PLAIN, _PLAIN + _SIGNS])
def test_caption_scores_are_those_of_coco_captions_own_tokenizer(vocabulary: str) -> None:
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason=INSTALL).PTBTokenizer()
    predictions, references = _pairs(vocabulary)
    texts = [*predictions, *(text for row in references for text in row)]
    tokens = [
        one for [one] in tokenizer.tokenize({row: [{"caption": text}] for row, text in enumerate(texts)}).values()
    ]
    same = np.mean([one.split() == caption_tokens(text) for one, text in zip(tokens, texts, strict=True)])
    assert same >= 0.995
    others = iter(tokens[len(predictions) :])
    bleu_4, rouges, cider = _coco_caption(
        tokens[: len(predictions)], [[next(others) for _ in row] for row in references]
    )
    assert _corpus_score(coco_bleu, predictions, references) == pytest.approx(bleu_4, abs=5e-4)
    ours = np.mean([coco_rouge_l(*pair) for pair in zip(predictions, references, strict=True)])
    assert ours == pytest.approx(np.mean(rouges), abs=5e-4)
    assert _cider(predictions, references) == pytest.approx(cider, abs=5e-3)


def test_f1_and_normalised_match_are_those_of_squads_script() -> None:
    squad = pytest.importorskip("torchmetrics.functional.text", reason=INSTALL).squad
    predictions, references = _pairs(_PLAIN + _SIGNS + " A The an naïve-café 'a' theme ", longest=4)
    predictions[:4], references[:4] = ["", "", "the", "a -"], [["", "x"], ["x"], ["", "an"], ["the!", "x"]]
    num_partial = 0
    for prediction, row in zip(predictions, references, strict=True):
        answer, target = {"prediction_text": prediction, "id": "1"}, {"answers": {"text": row}, "id": "1"}
        expected = {name: value.item() / 100 for name, value in squad(answer, target).items()}
        assert token_f1(prediction, row) == pytest.approx(expected["f1"]), (prediction, row)
        assert normalised_match(prediction, row) == expected["exact_match"], (prediction, row)
        num_partial += 0 < expected["f1"] < 1
    assert NUM_PAIRS / 4 < num_partial < NUM_PAIRS * 0.9


def test_anls_is_that_of_the_package_but_counts_exactly_one_half() -> None:
    official = pytest.importorskip("anls", reason=INSTALL).anls_score
    rng, num_halves = random.Random(2), 0
    for _ in range(3_000):
        prediction = "".join(rng.choices("abC ", k=rng.randint(1, 9))).strip() or "a"
        prediction = " ".join(prediction.split())  # the package's length is that of the text with single spaces
        references = [" ".join("".join(rng.choices("abC ", k=rng.randint(1, 9))).split()) or "b" for _ in range(2)]
        similarity = max(
            1 - Levenshtein.distance(prediction.lower(), reference.lower()) / max(len(prediction), len(reference))
            for reference in references
        )
        num_halves += similarity == 0.5
        expected = 0.5 if similarity == 0.5 else official(prediction, references)
        assert anls(prediction, references) == pytest.approx(expected), (prediction, references)
    assert num_halves > 50


@pytest.mark.parametrize("trials", [1, 2, 5, 30, 263])
def test_wilsons_interval_is_that_of_scipy_and_statsmodels(trials: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason=INSTALL)
    proportion = pytest.importorskip("statsmodels.stats.proportion", reason=INSTALL)
    for successes in range(trials + 1):
        found = wilson_interval(successes, trials)
        expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
        assert found == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert found == pytest.approx(proportion.proportion_confint(successes, trials, method="wilson"), abs=1e-9)


def test_the_sign_test_is_the_exact_mcnemar_test_of_statsmodels() -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables", reason=INSTALL)
    for won in range(0, 40, 3):
        for lost in range(1, 40, 4):
            assert sign_p_value(won, lost) == pytest.approx(tables.mcnemar([[7, won], [lost, 9]], exact=True).pvalue)


def test_permutation_p_values_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason=INSTALL)
    rng = np.random.default_rng(3)
    for shift in (0.0, 0.2, 0.5):
        differences = rng.normal(shift, 1, 12)
        exact = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
        assert permutation_p_value(differences, 100_000) == pytest.approx(exact, abs=0.006)


def test_bootstrap_intervals_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason=INSTALL)
    scores = np.random.default_rng(4).beta(2, 3, 500)
    tally = Tally()
    tally.add(scores)
    expected = stats.bootstrap((scores,), np.mean, n_resamples=9_999, method="percentile", rng=5).confidence_interval
    assert tally.bootstrap_interval(9_999, 0) == pytest.approx((expected.low, expected.high), abs=0.001)


def test_intervals_by_group_are_as_wide_as_statsmodels_cluster_robust_ones() -> None:
    models = pytest.importorskip("statsmodels.regression.linear_model", reason=INSTALL)
    rng = np.random.default_rng(6)
    sizes = rng.integers(1, 9, 400)
    groups = np.repeat(np.arange(400), sizes)
    mine, theirs = (rng.random(len(groups)) < np.repeat(rng.beta(2, 2, 400), sizes) for _ in range(2))

    def width(values: np.ndarray) -> float:
        model = models.OLS(values.astype(float), np.ones(len(values)))
        low, high = model.fit(cov_type="cluster", cov_kwds={"groups": groups}).conf_int()[0]
        return float(high - low)

    tally = Tally()
    tally.add(mine, groups)
    one = tally.estimate(1, 0)
    assert one.low is not None and one.high is not None
    assert one.high - one.low == pytest.approx(width(mine), rel=0.02)
    found = compare(mine, theirs, groups=groups)
    assert found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(width(mine.astype(float) - theirs), rel=0.06)
