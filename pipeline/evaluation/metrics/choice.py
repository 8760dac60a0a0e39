"""Multiple choice: which option did a free answer choose, and MMMU's rule for its open questions.

The rules start from MMMU's `parse_multi_choice_response` (Yue et al. 2023, https://arxiv.org/abs/2311.16502,
eval_utils.py), and differ: an option's exact text comes before letters in other words, "the answer is B" before other
letters, and an answer that names no option is wrong, not guessed, so that a score does not depend on a random number.
Knows strings only.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

LETTERS = string.ascii_uppercase

_MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{([^{}]*)\}")
_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_STATED = re.compile(
    r"(?i:\banswer\b|\b(?:option|choice)(?=\s+(?:is|should|would)))(?i:\s+(?:is|should be|would be))?\s*:?\s*"
)
# A capital, or a small letter that ends its clause: "is a cat" has an article.
_LETTER = re.compile(
    r"[\W_]*(?:(?:option|choice)\s+\W*)?(?:([A-Z])\b(?!'|\s+(?:think|believe|guess)\b)|([a-z])(?=[\W_]*(?:$|\n)|[).:]))"
)
_LABELLED = re.compile(r"\W*(?:(?i:option|choice)\s+\W*)?([A-Z])\s*(?:[.):](?:\s|\W*$)|\n)")
_OPTION = re.compile(
    r"(?i:option|choice)\s*:?\s*\**\s*\(?([A-Z])\b(?!')(?!\W*\s*(?:is|are|was|can)\s*(?:not\b|n't|wrong|incorrect))"
)
_BRACKETED = re.compile(r"\(([A-Z])\)")
# A capital that stands alone, but not the article or pronoun that opens a sentence ("A dog", "I see").
_STANDING = re.compile(r"(?<![\w'])([B-HJ-Z]|[AI](?!\s+[a-z]))(?![\w'])")


def extract_letter(response: str, choices: Sequence[str] = ()) -> str | None:
    """The letter of the chosen option, or None if the response names none.

    Tried in turn: a capital alone, which is no text even where options are letters in another order; an option's exact
    text; the letter alone; the text apart from case, articles and closing signs; the last "the answer is B"; "B." that
    opens the response or its last line; the last "option B", "(B)" or capital standing alone; an option's text in a
    sentence, the last and longest.
    """
    allowed = _letters(choices)
    response, texts = _unmarked(response), _without_labels([_unmarked(choice) for choice in choices[: len(LETTERS)]])
    if len(response) == 1 and response in allowed:
        return response
    if response and texts.count(response) == 1:
        return LETTERS[texts.index(response)]
    alone = _ALONE.fullmatch(response)
    if alone and alone[1].upper() in allowed:
        return alone[1].upper()
    plain = [_plain(text) for text in texts]
    if (answer := _plain(response)) and plain.count(answer) == 1:
        return LETTERS[plain.index(answer)]
    labelled = [f"{letter.lower()}{text}" for letter, text in zip(LETTERS, plain, strict=False)]  # "Answer: H2"
    for statement in reversed(list(_STATED.finditer(response))):
        rest = response[statement.end() :]
        if rest[:1].isalpha() and (named := _opening_option(rest, plain) or _opening_option(rest, labelled)):
            return named
        if (letter := _LETTER.match(rest)) and (found := (letter[1] or letter[2]).upper()) in allowed:
            return found
    for part in (response, response.rpartition("\n")[2]):
        if (label := _LABELLED.match(part)) and label[1] in allowed:
            return label[1]
    for pattern in (_OPTION, _BRACKETED, _STANDING):
        letters = [letter for letter in pattern.findall(response) if letter in allowed]
        if letters:
            return str(letters[-1])
    return _mentioned(_folded(response), plain)


def _letters(choices: Sequence[str]) -> str:
    """Those of the options that are there (a missing one is empty); all letters where no options are known."""
    return "".join(letter for letter, text in zip(LETTERS, choices, strict=False) if text.strip()) or LETTERS


def _unmarked(text: str) -> str:
    """Without LaTeX around it."""
    while (plain := _MARKUP.sub(r"\1", text)) != text:
        text = plain
    return text.strip().strip("$").strip()


def _without_labels(texts: list[str]) -> list[str]:
    """Options as published with their letters ("A. cat") without them."""
    labels = [re.match(rf"\(?{letter}[.):]\s*", text) for letter, text in zip(LETTERS, texts, strict=False)]
    if not texts or not all(label or not text for label, text in zip(labels, texts, strict=True)):
        return texts
    return [text[label.end() :] if label else "" for label, text in zip(labels, texts, strict=True)]


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _plain(text: str) -> str:
    """Without case, quotes, a leading article and closing signs. Signs that can be the answer ("-5", "<") stay."""
    folded = _folded(text).strip("\"'*").rstrip(".,;:\"'* ")
    return re.sub(r"^(?:a|an|the)\s+(?=.)", "", folded)


def _positions(text: str, option: str) -> list[int]:
    """Where the option stands as whole words: "5" is neither in "-5" nor in "1.5", and one letter is no word."""
    if not re.search(r"\w", option) or re.fullmatch(r"[a-z]", option):
        return []
    return [found.end() for found in re.finditer(rf"(?<![\w+\-])(?<!\d[.,]){re.escape(option)}(?!\w|[.,]\d)", text)]


def _mentioned(text: str, plain: Sequence[str]) -> str | None:
    """Of options that end at the same position the longest: "dark blue" contains "blue"."""
    counts = Counter(plain)
    mentions = [
        (ends[-1], len(option), letter)
        for option, letter in zip(plain, LETTERS, strict=False)
        if counts[option] == 1 and (ends := _positions(text, option))
    ]
    return max(mentions)[2] if mentions else None


def _opening_option(text: str, plain: Sequence[str]) -> str | None:
    """The option whose text the text opens with after an article: "A cat."."""
    opening = _plain(text)
    fitting = [
        (len(option), letter)
        for option, letter in zip(plain, LETTERS, strict=False)
        if plain.count(option) == 1 and len(option) in _positions(opening, option)
    ]
    return max(fitting)[1] if fitting else None


def choice_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of a reference that is a letter itself, an option's text, or an option's number from 0."""
    answer = answer.strip()
    allowed = _letters(choices)
    if len(answer) == 1 and answer in allowed:
        return answer
    if answer and answer in choices[: len(LETTERS)]:
        return LETTERS[list(choices).index(answer)]
    numbered = LETTERS[int(answer)] if answer.isdecimal() and int(answer) < len(LETTERS) else ""
    return numbered if numbered and numbered in allowed else None


def is_right(letter: str | None, references: Sequence[str], choices: Sequence[str]) -> float:
    """1 if the letter is that of a reference."""
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
        shortest = ""
        for (
            tail
        ) in tails:  # an empty one ends the search for this line, unless another follows: so is the published code
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in set(":,.!?;'"):
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
