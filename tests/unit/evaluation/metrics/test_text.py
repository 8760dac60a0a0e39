"""Match, token F1, edit distance, ANLS and relaxed accuracy against their definitions and worked examples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.metrics.text import (
    anls,
    exact_match,
    normalise_answer,
    normalised_match,
    relaxed_accuracy,
    token_f1,
)


def test_exact_match_ignores_surrounding_space_only() -> None:
    assert exact_match(" red cube\n", ["blue", "red cube"]) == 1
    assert exact_match("Red cube", ["red cube"]) == 0
    assert exact_match("red cube", []) == 0


def test_normalised_match_ignores_case_punctuation_and_articles() -> None:
    assert normalised_match("The Denver Broncos!", ["denver broncos"]) == 1
    assert normalised_match("Denver", ["denver broncos"]) == 0
    assert normalise_answer("An apple, a day; the end.") == "apple day end"


def test_token_f1_of_a_worked_example() -> None:
    # Shared "denver broncos": precision 2/3, recall 2/2, F1 0.8; the better of two references counts.
    assert token_f1("the Denver Broncos team", ["Carolina", "Denver Broncos"]) == pytest.approx(0.8)
    assert token_f1("red red", ["red"]) == pytest.approx(2 / 3), "a word counts as often as both have it"
    assert token_f1("", ["the"]) == 1, "both are empty"
    assert token_f1("red", ["the"]) == 0


def _table_distance(left: str, right: str) -> int:
    """The textbook table, slow and plain."""
    previous = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        current = [i]
        for j, b in enumerate(right, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]


@given(st.text("abc", min_size=1, max_size=90), st.text("abc", max_size=90))
def test_anls_equals_the_textbook_table(left: str, right: str) -> None:
    similarity = 1 - _table_distance(left, right) / max(len(left), len(right))
    assert anls(left, [right]) == pytest.approx(similarity if similarity >= 0.5 else 0)


def test_anls_of_pages_of_text_is_fast() -> None:
    assert anls("kitten" * 3_000, ["sitting" * 3_000]) > 0.5


def test_anls_of_worked_examples() -> None:
    # One of eleven characters differs: 1 - 1/11.
    assert anls("Hello World", ["hello worl"]) == pytest.approx(1 - 1 / 11)
    assert anls("  Hello   WORLD ", ["hello world"]) == 1
    assert anls("abcd", ["xbcd", "abyy", "zzzz"]) == pytest.approx(0.75), "the nearest reference counts"


def test_anls_is_zero_if_the_normalised_distance_is_above_one_half() -> None:
    # As the DocVQA challenge's scorer: exactly one half counts, and white space counts in the length.
    assert anls("ab", ["ax"]) == 0.5
    assert anls("abc", ["axy"]) == 0
    assert anls("a   b", ["a c"]) == pytest.approx(0.8)
    assert anls("abc", ["abx"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("95", "100", True),
        ("94.9", "100", False),
        ("105", "100", True),
        ("-100", "100", False),
        ("0.1", "0", False),
        ("0.0", "0", False),
        ("0", "0", True),
        ("0.95", "1", False),
        ("10.5", "10", True),
        ("5.7", "6", True),
        ("12%", "0.12", True),
        ("12%", "12%", True),
        ("$1,000", "1010", False),
        ("1,000", "1000", False),
        ("14.", "14", True),
        ("5%%", "0.05", True),
        ("$5", "$5", True),
        ("inf", "3", False),
        ("Yes", "yes", True),
        ("2009, 2010", "2009", False),
        ("about 14", "14", False),
        ("1,2", "12", False),
        ("", "3", False),
        ("%", "3", False),
        ("1e2", "100", True),
    ],
)
def test_relaxed_accuracy_allows_five_percent_on_numbers_and_nothing_on_text(
    answer: str, reference: str, right: bool
) -> None:
    assert relaxed_accuracy(answer, [reference]) == float(right)


@given(st.text(max_size=30), st.lists(st.text(max_size=30), max_size=3))
def test_every_score_is_between_zero_and_one_for_any_text(answer: str, references: list[str]) -> None:
    for score in (exact_match, normalised_match, token_f1, anls, relaxed_accuracy):
        assert 0 <= score(answer, references) <= 1
