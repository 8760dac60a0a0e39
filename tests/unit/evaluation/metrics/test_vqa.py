"""VQA accuracy: the official normalisation and the ten-answer rule."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.metrics.vqa import normalise_vqa, vqa_accuracy


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
    assert vqa_accuracy("Red.", references) == pytest.approx(accuracy)


def test_both_sides_are_normalised() -> None:
    assert vqa_accuracy("2", ["two"] * 10) == 1
    assert vqa_accuracy("The cat!", ["cat", "a cat", "Cat."] + ["dog"] * 7) == pytest.approx(0.9)


def test_a_single_reference_counts_as_ten_equal_ones() -> None:
    assert vqa_accuracy("red", ["red"]) == 1
    assert vqa_accuracy("red", ["blue"]) == 0
    assert vqa_accuracy("red", []) == 0


@given(st.sampled_from("abcd"), st.lists(st.sampled_from(["b", "c", "d"]), min_size=10, max_size=10))
def test_vqa_accuracy_is_the_mean_over_all_nine_of_ten_references(answer: str, references: list[str]) -> None:
    nines = itertools.combinations(references, 9)
    expected = [min(1, sum(reference == answer for reference in nine) / 3) for nine in nines]
    assert vqa_accuracy(answer, references) == pytest.approx(sum(expected) / 10)
