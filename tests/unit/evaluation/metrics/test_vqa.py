"""VQA accuracy: the official normalisation and the ten-answer rule."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.metrics.vqa import normalise_textvqa, normalise_vqa, textvqa_accuracy, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat", "cat"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("red, white", "red white"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("let's go", "let's go"),
        ("a\nb\tc", "b c"),
    ],
)
def test_the_official_normalisation(text: str, normal: str) -> None:
    assert normalise_vqa(text) == normal


@pytest.mark.parametrize(("agree", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_the_ten_answer_rule(agree: int, accuracy: float) -> None:
    references = ["red"] * agree + ["blue"] * (10 - agree)
    assert vqa_accuracy("red", references) == textvqa_accuracy("Red.", references) == pytest.approx(accuracy)


def test_both_sides_are_normalised() -> None:
    assert vqa_accuracy("2", ["two"] * 9 + ["2"]) == 1
    assert vqa_accuracy("The cat!", ["cat", "a cat", "Cat."] + ["dog"] * 7) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("answer", "reference", "vqa", "textvqa"),
    [("yes", "yes", 1, 1), ("Yes", "yes", 0, 1), ("2", "two", 0, 1), ("two", "two", 1, 1), ("\tred ", "red\n", 1, 1)],
)
def test_where_all_references_agree_the_vqa_code_compares_as_it_is(
    answer: str, reference: str, vqa: float, textvqa: float
) -> None:
    assert vqa_accuracy(answer, [reference] * 10) == vqa
    assert textvqa_accuracy(answer, [reference] * 10) == textvqa
    assert vqa_accuracy(answer, [reference] * 9 + ["green"]) == 1, "one who differs, and all are normalised"


# Pairs with the results of VQA's vqaEval.py and of mmf's m4c_evaluators.py, worked out by their published rules.
@pytest.mark.parametrize(
    ("text", "vqa", "textvqa"),
    [
        ("Where's Waldo?", "where's waldo", "where 's waldo"),
        ("what, now", "what now", "what now"),
        ("one,two", "1 2", "onetwo"),
        ("10,000 miles", "10000 miles", "10000 miles"),
        ("1,5-6", "156", "15 6"),
        ("yes?no", "yes no", "yesno"),
        ("let's", "let's", "let 's"),
        ("dont", "don't", "don't"),
        ("st. john's no. 5", "st john's no 5", "st john 's no 5"),
        ("www.google.com", "wwwgooglecom", "wwwgooglecom"),
        ("3.50", "3.50", "3.50"),
        ("." * 40 + "x", "." * 8 + "x", "." * 8 + "x"),
    ],
)
def test_the_normal_forms_of_vqa_and_of_textvqa(text: str, vqa: str, textvqa: str) -> None:
    assert normalise_vqa(text) == vqa
    assert normalise_textvqa(text) == textvqa


def test_a_single_reference_counts_as_ten_equal_ones() -> None:
    assert vqa_accuracy("Red.", ["red"]) == 1
    assert vqa_accuracy("red", ["blue"]) == 0
    assert vqa_accuracy("red", []) == 0


@given(st.sampled_from("bcde"), st.lists(st.sampled_from(["b", "c", "d"]), min_size=10, max_size=10))
def test_vqa_accuracy_is_the_mean_over_all_nine_of_ten_references(answer: str, references: list[str]) -> None:
    nines = itertools.combinations(references, 9)
    expected = [min(1, sum(reference == answer for reference in nine) / 3) for nine in nines]
    assert vqa_accuracy(answer, references) == pytest.approx(sum(expected) / 10)
