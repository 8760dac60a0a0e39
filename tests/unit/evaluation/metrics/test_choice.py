"""Which option an answer chose, and MMMU's rule for open questions."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pytest

from pipeline.evaluation.metrics.choice import choice_letter, extract_letter, open_answer
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.settings import ScoringSettings
from pipeline.schema import result_schema
from tests.unit.evaluation.stated_answers import STATED

ANIMALS = ("cat", "dog", "a blue bird", "blue")
TEXTS = pa.list_(pa.string())


def score(metric: str, answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The score of one result row."""
    row = {"id": "0", "text": answer, "status": "ok", "references": list(references), "choices": list(choices)}
    schema = result_schema(pa.schema([("references", TEXTS), ("choices", TEXTS)]))
    batch = pa.RecordBatch.from_pylist([row], schema=schema)
    scorer = Scorer(ScoringSettings(references="references", metrics=(metric,), choices="choices"))
    value: float = scorer.score(batch).column("score")[0].as_py()
    return value


def multiple_choice(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    return score("multiple_choice", answer, references, choices)


def mmmu(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    return score("mmmu", answer, references, choices)


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (C). ", "C"),
        ("B. dog", "B"),
        ("B) dog", "B"),
        ("dog", "B"),
        ("The dog.", "B"),
        ("The answer is B", "B"),
        ("The best answer is: **C**", "C"),
        ("Answer: (D) because of its colour", "D"),
        ("The correct option is A because it purrs", "A"),
        ("I think (A) is wrong, so (C)", "C"),
        ("It shows a dog on the grass of a garden", "B"),
        ("In the picture one sees a blue bird", "C"),
        ("A dog", "B"),
        ("I see nothing of the kind", None),
        ("Option E", None),
        ("", None),
        ("hotdogs are served", None),
        ("B.\nBecause the animal barks", "B"),
        ("the answer is b", "B"),
        ("dog or cat", "A"),
    ],
)
def test_the_letter_is_read_from_free_answers(response: str, letter: str | None) -> None:
    assert extract_letter(response, ANIMALS) == letter


@pytest.mark.parametrize(
    ("response", "options", "letter"),
    [
        ("-5", ["5", "-5"], "B"),
        ("5", ["-5", "6"], None),
        ("It is -5 degrees", ["5", "-5"], "B"),
        ("1.5", ["15", "1.5"], "B"),
        ("15", ["1.5", "2"], None),
        ("<", [">", "<"], "B"),
        ("Aa", ["AA", "Aa", "aa"], "B"),
        ("dog", ["A. cat", "B. dog"], "B"),
        ("It is a dog", ["A. cat", "B. dog"], "B"),
        ("B. The barking fits, option A is wrong", ["cat", "dog"], "B"),
        ("Option B. dog because option A shows a cat", ["cat", "dog"], "B"),
        ("Option B: the dog. Option A shows a cat.", ["cat", "dog"], "B"),
        ("A) is a cat and B) is a dog. The answer is B", ["cat", "dog"], "B"),
        ("The answer is A cat.", ["dog", "cat"], "B"),
        ("The answer is b", ["cat", "dog"], "B"),
        ("The answer is b.", ["cat", "dog"], "B"),
        (r"\text{B}", ["cat", "dog"], "B"),
        (r"The answer is $\boxed{\text{B}}$", ["cat", "dog"], "B"),
        ("C", ["cat", "", "dog"], "C"),
        ("The answer is a 5.", ["4", "5"], "B"),
        ("I see a cat", ["A", "cat"], "B"),
    ],
)
def test_signs_labels_and_statements_are_read_as_models_write_them(
    response: str, options: list[str], letter: str | None
) -> None:
    assert extract_letter(response, options) == letter


def test_an_answer_that_names_no_option_is_wrong_every_time() -> None:
    assert [multiple_choice("no idea", ["A"], ANIMALS) for _ in range(50)] == [0.0] * 50


def test_a_reference_that_names_no_option_matches_nothing() -> None:
    assert multiple_choice("no idea", ["9"], ANIMALS) == 0, "not even an answer that names none either"
    assert multiple_choice("B", ["9", "B"], ANIMALS) == 1


def test_options_beyond_the_alphabet_have_no_letter() -> None:
    options = [f"option {number}" for number in range(30)]
    assert multiple_choice("option 3", ["option 3"], options) == 1
    assert multiple_choice("option 29", ["option 29"], options) == 0


@pytest.mark.parametrize(
    ("reference", "letter"), [("C", "C"), ("dog", "B"), ("0", "A"), ("3", "D"), ("9", None), ("c", None), ("", None)]
)
def test_references_are_letters_texts_or_numbers_from_zero(reference: str, letter: str | None) -> None:
    assert choice_letter(reference, ANIMALS) == letter


@pytest.mark.parametrize("reference", ["", "AB", "B", "1"])
def test_a_missing_option_and_a_text_of_several_letters_are_no_letter(reference: str) -> None:
    options = ["left", "", "right"]
    assert choice_letter(reference, options) is None
    assert (choice_letter("C", options), choice_letter("2", options)) == ("C", "C")
    assert (extract_letter("B", options), extract_letter("The answer is B.", options)) == (None, None)


def test_the_text_of_an_option_comes_before_its_number() -> None:
    assert choice_letter("1", ("3", "2", "1")) == "C"


def test_multiple_choice_compares_letters_whatever_form_either_side_has() -> None:
    assert multiple_choice("The answer is (B).", ["1"], ANIMALS) == 1
    assert multiple_choice("dog", ["B"], ANIMALS) == 1
    assert multiple_choice("cat", ["B"], ANIMALS) == 0
    assert multiple_choice("C", ["C"]) == 1, "letters need no texts"


# (answer, letter of MMMU's parse_multi_choice_response, or None where it guesses; our letter)
@pytest.mark.parametrize(
    ("response", "official", "letter"),
    [
        ("B", "B", "B"),
        ("(B)", "B", "B"),
        ("The answer is B", "B", "B"),
        ("The correct answer is (B) dog", "B", "B"),
        ("Option (A) is wrong because of its colour, so the answer is (B).", "B", "B"),
        ("I think that the picture shows a blue bird on the grass", "D", "C"),
        ("B. dog", None, "B"),
        ("dog", None, "B"),
        ("b", None, "B"),
        ("The answer is **B**.", None, "B"),
        (r"\boxed{B}", None, "B"),
        ("I do not know", None, None),
    ],
)
def test_options_are_found_where_mmmu_finds_them_and_where_it_guesses(
    response: str, official: str | None, letter: str | None
) -> None:
    assert extract_letter(response, ANIMALS) == letter
    assert official in (letter, None) or response.endswith("grass"), "of texts that end together the longest counts"


@pytest.mark.parametrize(
    ("response", "options", "letter"), [(answer, options, letter) for answer, options, _, letter in STATED]
)
def test_answers_are_read_as_stated_where_mmmu_pro_takes_another_letter_of_the_text(
    response: str, options: list[str], letter: str | None
) -> None:
    assert extract_letter(response, options) == letter


def test_mmmu_scores_a_row_by_its_options_or_as_an_open_answer() -> None:
    assert mmmu("It is the dog", ["B"], ANIMALS) == 1
    assert mmmu("B", ["bird"]) == 0, "without options it is an open answer"
    assert mmmu("So the result is 12.5.", ["12.5"]) == 1


@pytest.mark.parametrize(
    ("response", "reference", "right"),
    [
        ("So the result is 12.5.", "12.5", True),
        ("The total is $1,234.00", "1234", True),
        ("x = 4", "4", True),
        ("Therefore the answer is the Krebs cycle", "krebs cycle", True),
        ("14", "4", False),
        ("The answer is 3.14159", "3.14", True),
        ("it is glucose", "fructose", False),
        ("b", "b", True),
        ("Krebs Cycle", "KREBS cycle", True),
        ("x = 4\nso y = 5", "5", True),
        ("so y = 5\nchecked", "y = 5", True),
        ("the sum a = 4\nnothing else", "4", True),
        ("a = glucose\nb = fructose", "a = glucose", False),
        ("b = fructose", "b = fructose", False),
        ("...", "4", False),
        ("0.333", "0.33", True),
        ("0.336", "0.33", False),
        ("x = 4\nso y = 5", "4", False),
        ("3e5", "300000", True),
        ("the answer is not glucose", "glucose", True),
        ("about 5%", "5", True),
        ("-4", "4", False),
        ("5/2", "2.5", False),
        ("the answer is a =", "answer is", True),
    ],
)
def test_open_answers_follow_the_rule_of_mmmu(response: str, reference: str, right: bool) -> None:
    assert open_answer(response, [reference]) == float(right)
