"""Multiple choice: which option did a free answer choose, and MMMU's rule for its open questions.

The order of the rules follows MMMU's `parse_multi_choice_response` (Yue et al. 2023, https://arxiv.org/abs/2311.16502,
eval_utils.py), which lmms-eval and VLMEvalKit use as well. It differs in one respect: an answer that
names no option is wrong, not guessed, so that a score does not depend on a random number. Knows strings only.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from pipeline.evaluation.metrics.text import normalise_answer

LETTERS = string.ascii_uppercase

_STATED = re.compile(r"(?i:answer|option|choice)(?i:\s+(?:is|should be|would be))?\s*:?\s*\**\s*\(?([A-Z])\b(?!')")
_ALONE = re.compile(r"^\W*([A-Za-z])\W*$")
_LABELLED = re.compile(r"^\W*([A-Z])\s*[.):]\s")
_BRACKETED = re.compile(r"\(([A-Z])\)")
# A capital that stands alone, but not the article or pronoun that opens a sentence ("A dog", "I see").
_STANDING = re.compile(r"(?<![\w'])([B-HJ-Z]|[AI](?!\s+[a-z]))(?![\w'])")


def extract_letter(response: str, choices: Sequence[str] = ()) -> str | None:
    """The letter of the chosen option, or None if the response names none.

    Tried in turn: the letter alone; an option's text alone; "the answer is B"; "B. text"; "(B)"; a capital standing
    alone; an option's text somewhere in a sentence. The last mention wins, as in MMMU.
    """
    allowed = LETTERS[: len(choices) or None]
    response = response.strip()
    alone = _ALONE.match(response)
    if alone and alone[1].upper() in allowed:
        return alone[1].upper()
    normal = normalise_answer(response)
    texts = [normalise_answer(choice) for choice in choices[: len(LETTERS)]]
    if normal and texts.count(normal) == 1:
        return LETTERS[texts.index(normal)]
    for pattern in (_STATED, _LABELLED, _BRACKETED, _STANDING):
        found: list[str] = [letter for letter in pattern.findall(response) if letter in allowed]
        if found:
            return found[-1]
    starts = [f" {normal} ".rfind(f" {text} ") if text else -1 for text in texts]
    # Of options that end at the same position take the longest: "dark blue" contains "blue".
    mentioned = [
        (start + len(text), len(text), letter)
        for start, text, letter in zip(starts, texts, LETTERS, strict=False)
        if start >= 0
    ]
    return max(mentioned, key=lambda mention: mention[:2])[2] if mentioned else None


def choice_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of a reference that is a letter itself, an option's text, or an option's number from 0."""
    answer = answer.strip()
    allowed = LETTERS[: len(choices) or None]
    if len(answer) == 1 and answer in allowed:
        return answer
    if answer in choices[: len(LETTERS)]:
        return LETTERS[list(choices).index(answer)]
    return allowed[int(answer)] if answer.isdecimal() and int(answer) < len(allowed) else None


def multiple_choice(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 if the chosen option is the right one. References are letters, or texts of `choices`."""
    letter = extract_letter(prediction, choices)
    return float(letter is not None and any(letter == choice_letter(right, choices) for right in references))


_COMMA_NUMBER = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE_NUMBER = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_LEAD_INS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def open_answer(prediction: str, references: Sequence[str]) -> float:
    """MMMU's rule for open questions: the key phrases' text contains the reference, or a number equals it to 0.01.

    Yue et al. 2023, eval_utils.py: `parse_open_response` and `eval_open`.
    """
    expected = [form for reference in references for form in _forms(reference)]
    phrases = _key_phrases(prediction)
    numbers = [
        number
        for phrase in phrases
        for pattern in (_COMMA_NUMBER, _SCIENTIFIC, _SIMPLE_NUMBER)
        for number in pattern.findall(phrase)
    ]
    for found in {form for text in [*phrases, *numbers] for form in _forms(text)}:
        if isinstance(found, str):
            if any(isinstance(form, str) and form in found for form in expected):
                return 1.0
        elif found in expected:
            return 1.0
    return 0.0


def _key_phrases(response: str) -> list[str]:
    """The shortest text after a lead-in such as "is " in each line; the whole response if no line has one."""
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    phrases = []
    for index, line in enumerate(lines):
        lead_ins = (*_LEAD_INS, "=") if index == len(lines) - 1 else _LEAD_INS
        tails = [line.split(lead_in)[-1].strip() for lead_in in lead_ins if lead_in in line]
        shortest = min((tail for tail in tails if tail), key=len, default="")
        if shortest and shortest not in ":,.!?;'":
            phrases.append(shortest)
    return phrases or [response]


def _forms(text: str) -> list[str | float]:
    """A number rounded to 0.01, or lower-case text; one letter keeps a space on either side, to match whole words."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        pass
    lower = text.lower()
    return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
