"""Our scores against lmms-eval's, which follow the sets' own code, over drawn pairs.

`make setup` installs lmms-eval without its dependencies, so the tests read single functions out of its files.
"""

from __future__ import annotations

import ast
import logging
import random
import re
import statistics
import string
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest

from pipeline.evaluation.metrics.choice import extract_letter, open_answer
from pipeline.evaluation.metrics.text import anls, relaxed_accuracy
from pipeline.evaluation.metrics.vqa import normalise_textvqa, normalise_vqa, textvqa_accuracy, vqa_accuracy
from tests.unit.evaluation.stated_answers import STATED

NUM_PAIRS = 5_000
_WORDS = """
    a the two none ten red Red cat's dont can't o'clock let's 3 3.5 1,000 10,5 $5 50% yes. no! (left) t-shirt and/or
    st. "stop" what? a_b x;y 7:30 @home -5 0 0.0 naïve\tcafé \\n A.B. & + = u.s. couldntve isnt
"""


class _NoGuess(random.Random):
    """In place of the guess of an answer that names no option."""

    def choice(self, seq: Any) -> Any:
        return None


def _name(node: ast.stmt) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else node
    return str(getattr(target, "id", getattr(target, "name", "")))


def published(file: str, *names: str) -> Any:
    """Functions, classes and constants of a file of lmms-eval, without what the file imports."""
    found = find_spec("lmms_eval")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("make setup, or pip install --no-deps lmms-eval, to run this")
    path = Path(found.submodule_search_locations[0]) / file
    body = [node for node in ast.parse(path.read_text()).body if _name(node) in names]
    assert len(body) == len(names), f"{path} has not all of {', '.join(names)}"
    scope: dict[str, Any] = {"re": re, "np": np, "statistics": statistics, "string": string, "random": _NoGuess()}
    scope |= {"List": list, "Optional": Optional, "register_metric": lambda **_: lambda function: function}
    scope["eval_logger"] = logging.getLogger("lmms_eval")
    exec(compile(ast.Module(body, []), str(path), "exec"), scope)
    return scope[names[0]] if len(names) == 1 else tuple(scope[name] for name in names)


def _texts(num_texts: int = NUM_PAIRS, seed: int = 0, longest: int = 4) -> list[str]:
    """Words with signs, numbers and contractions, some of them run together."""
    rng, words = random.Random(seed), _WORDS.split(" ")
    return ["".join(rng.choice(words) + rng.choice(["", " ", " ", ", "]) for _ in range(rng.randint(1, longest)))
            for _ in range(num_texts)]  # fmt: skip


def _answers(seed: int) -> tuple[list[str], list[list[str]]]:
    """Answers, and ten references of each, from the same few texts."""
    rng, texts = random.Random(seed), _texts(seed=seed)
    drawn = [[rng.choice(texts[row : row + 4]) for _ in range(11)] for row in range(len(texts) - 4)]
    return [one[0] for one in drawn], [one[1:] for one in drawn]


def test_normal_forms_are_those_of_vqa_and_textvqa() -> None:
    processor = published("tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")()
    for text in _texts():
        line = text.replace("\n", " ").replace("\t", " ").strip()
        assert normalise_vqa(text) == processor.process_digit_article(processor.process_punctuation(line)), text
        assert normalise_textvqa(text) == processor(text), text


@pytest.mark.parametrize("name", ["vqav2", "textvqa"])
def test_accuracies_are_those_of_vqa_where_people_differ_and_those_of_textvqa(name: str) -> None:
    processor = published("tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")
    official = published(f"tasks/{name}/utils.py", f"{name}_process_results")
    official.__globals__["EvalAIAnswerProcessor"] = processor
    ours, num_right = {"vqav2": vqa_accuracy, "textvqa": textvqa_accuracy}[name], 0.0
    for answer, references in zip(*_answers(1), strict=True):
        if name == "vqav2" and len({" ".join(text.split()) for text in references}) == 1:
            continue  # VQA's own code then compares as it is
        as_set = [{"answer": text, "answer_id": number} for number, text in enumerate(references)]
        doc = {"question_id": 1, "answers": as_set if name == "vqav2" else list(references)}
        score = ours(answer, references)
        assert score == pytest.approx(official(doc, [answer])["exact_match"]), (answer, references)
        num_right += score
    assert num_right > NUM_PAIRS / 4


def test_relaxed_accuracy_is_that_of_chartqa() -> None:
    official: Callable[[str, str], bool] = published("tasks/chartqa/utils.py", "relaxed_correctness")
    rng, num_right = random.Random(2), 0
    for _ in range(NUM_PAIRS):
        number = rng.choice([rng.randint(-9, 120), round(rng.uniform(-2, 2), 2), 0])
        near = rng.choice([number, number * 1.05, number * 0.95, number * 1.051, 0, 0.0])
        pair = [
            rng.choice([f"{value}", f"{value}%", f"{value:.1f}", f"${value}", f"{value:,}", "Yes", "yes", "%", "1e2"])
            for value in (near, number)
        ]
        right = relaxed_accuracy(pair[0], [pair[1]])
        assert right == official(*pair), pair
        num_right += int(right)
    assert NUM_PAIRS / 10 < num_right < NUM_PAIRS * 0.9


def test_anls_is_that_of_docvqa() -> None:
    _, official = published("api/metrics.py", "levenshtein_distance", "anls")
    rng, num_halves = random.Random(3), 0
    for _ in range(NUM_PAIRS):
        prediction, *references = ("".join(rng.choices("abC  ", k=rng.randint(1, 9))) for _ in range(3))
        expected = official(references, [prediction])["anls"]
        num_halves += expected == 0.5
        assert anls(prediction, references) == pytest.approx(expected), (prediction, references)
    assert num_halves > 50


def test_open_answers_are_scored_as_mmmu_scores_them() -> None:
    parse, *_, official = published(
        "tasks/mmmu/utils.py",
        "parse_open_response", "extract_numbers", "check_is_number", "normalize_str", "eval_open",
    )  # fmt: skip
    rng, num_right = random.Random(4), 0
    phrases = [
        "so ",
        "is ",
        "answer ",
        "= ",
        "thus ",
        "the ",
        "\n",
        ". ",
        "3.14",
        "3.141",
        "1,234",
        "3e2",
        "-5",
        "x",
        "cat",
        "Cat ",
    ]
    for _ in range(NUM_PAIRS):
        response = "".join(rng.choices(phrases, k=rng.randint(1, 7)))
        references = rng.choices(["3.14", "1234", "300", "-5", "5", "x", "cat", "the cat", "= x"], k=rng.randint(1, 2))
        expected = official(references, parse(response))
        assert open_answer(response, references) == expected, (response, references)
        num_right += expected
    assert num_right > NUM_PAIRS / 10


def test_plainly_stated_letters_are_those_of_mmmu_video_mme_and_mmbench() -> None:
    mmmu = published("tasks/_task_utils/mmmu_mcq_utils.py", "parse_mmmu_multi_choice_response")
    _, _, video_mme = published(
        "tasks/_task_utils/mcq_extract.py", "_ANSWER_PHRASES", "_FORMAT_PRIORITY", "extract_mcq_answer"
    )
    mmbench = published("tasks/mmbench/mmbench_evals.py", "MMBench_Evaluator")
    texts = {"A": "cat", "B": "dog", "C": "blue bird", "D": "snow"}
    forms = ["{}", "({})", "{}.", "The answer is {}", "The answer is ({}).", "the best of them is option {}"]
    forms += ["Answer: {}", "({}) {text}", "It is ({}) because of its colour"]
    for letter, text in texts.items():
        for form in forms:
            response = form.format(letter, text=text)
            assert extract_letter(response, list(texts.values())) == letter == mmmu(response, list(texts), texts), form
            assert video_mme(response, list(texts)) == letter, form
            found = mmbench.can_infer(mmbench.__new__(mmbench), response, dict(texts))
            assert found == letter or (letter == "A" and not found), form  # A in four words may be an article to it
        response = f"One sees {text} in this picture"
        assert extract_letter(response, list(texts.values())) == letter == mmmu(response, list(texts), texts)


def test_letters_of_the_table_are_those_of_mmmu() -> None:
    official = published("tasks/_task_utils/mmmu_mcq_utils.py", "parse_mmmu_multi_choice_response")
    for response, options, expected, _ in STATED:
        after = response.rpartition("Answer:")[2]  # MMMU-Pro's rule before MMMU's: one letter after the last "Answer:"
        by_letter = dict(zip("ABCDEFGHIJ", options, strict=False))
        stated = [letter for letter in by_letter if letter in after] if "Answer:" in response else []
        found = stated[0] if len(stated) == 1 else official(response, list(by_letter), by_letter)
        assert found == expected, response
