"""VQA accuracy: the answer of a crowd of ten, after the normalisation of VQA or of TextVQA.

Antol et al. 2015, https://arxiv.org/abs/1505.00468, section 3; Goyal et al. 2017 (VQA v2). The normalisation is that
of the evaluation code at https://github.com/GT-Vision-Lab/VQA: punctuation, number words, articles, contractions.
TextVQA (Singh et al. 2019, https://arxiv.org/abs/1904.08920) is scored by mmf's `TextVQAAccuracyEvaluator`.
Knows strings only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")
_AFFECTED = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!.]")

# Words that annotators wrote without one of their apostrophes; the keys are the words with one apostrophe removed.
_WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
    when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:index] + word[index + 1 :]: word
    for word in _WITH_APOSTROPHES.split()
    for index, letter in enumerate(word)
    if letter == "'"
}
# The official table's irregular entries.
_CONTRACTIONS |= {
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=65_536)  # a few thousand answers make up most of every VQA set
def normalise_vqa(text: str) -> str:
    """The normal form of the VQA code."""
    text = _on_one_line(text)
    words = []
    for word in (_without_punctuation(text) if _AFFECTED.search(text) else text).lower().split():
        word = _NUMBER_WORDS.get(word, word)
        if word not in _ARTICLES:
            words.append(_CONTRACTIONS.get(word, word))
    return " ".join(words)


def normalise_textvqa(text: str) -> str:
    """The normal form of mmf's `EvalAIAnswerProcessor`: commas and question marks vanish, "'s" is a word."""
    return normalise_vqa(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def _without_punctuation(text: str) -> str:
    """Removes a sign beside a space, replaces others by a space; a thousands separator removes every sign."""
    cleaned = text
    has_thousands = _THOUSANDS.search(text) is not None
    for sign in _PUNCTUATION:
        if sign in text:
            beside_space = has_thousands or f"{sign} " in text or f" {sign}" in text
            cleaned = cleaned.replace(sign, "" if beside_space else " ")
    return _FULL_STOP.sub("", cleaned, count=32)  # the published code passes a flag, 32, in the place of the count


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """The VQA code's accuracy: both sides are normalised, but compared as they are if all references are one text.

    The published answers are all but normal already; "Yes" is wrong where all ten people wrote "yes". A single
    reference, which VQA does not have, is normalised and counts as if all ten people had given it.
    """
    if len(references) > 1:
        answers = [_on_one_line(reference) for reference in references]
        if len(set(answers)) == 1:
            return _agreement(_on_one_line(prediction), answers)
    return _agreement(normalise_vqa(prediction), [normalise_vqa(reference) for reference in references])


def textvqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """The same rule as mmf applies it to TextVQA: its own normal form, on both sides always."""
    return _agreement(normalise_textvqa(prediction), [normalise_textvqa(reference) for reference in references])


def _agreement(answer: str, references: Sequence[str]) -> float:
    """Mean over every choice of nine of the ten people of min(1, people who agree / 3)."""
    people, agree = len(references), references.count(answer)
    if people < 2:
        return float(agree)
    # Leaving out one who agrees leaves agree - 1, leaving out another leaves all of them.
    return (agree * min(1.0, (agree - 1) / 3) + (people - agree) * min(1.0, agree / 3)) / people
