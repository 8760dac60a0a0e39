"""When a sample ends, token by token, with a detokenizer of bytes."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import pytest

from pipeline.engine.sampler import forbidden_tokens, sample_rows, set_steps
from pipeline.engine.scheduling.stopping import StopRules
from pipeline.engine.sequence import PromptLayout, Request, Sequence
from pipeline.engine.settings import SamplingParams

END, STOP = 1, 2


class Bytes:
    """Tokens are bytes, as of a character that no token holds whole. Remembers the most tokens that it was given."""

    longest = 0

    def __call__(self, token_ids: SequenceOf[int]) -> str:
        self.longest = max(self.longest, len(token_ids))
        return bytes(token_ids).decode("utf-8", "replace")


def answer(tokens: SequenceOf[int], **params: Any) -> Sequence:
    """A sequence that got these tokens, until one ended it."""
    rules = StopRules(frozenset({END}), params.pop("detokenize", Bytes()))
    request = Request(0, np.zeros(1, dtype=np.int32), (), SamplingParams(max_tokens=50, **params))
    sequence = Sequence(request, 0, 0, PromptLayout(np.zeros((3, 1), dtype=np.int32), 0, ()))
    for token in tokens:
        rules.append(sequence, token)
        if sequence.is_finished:
            break
    return sequence


def test_end_tokens_are_forbidden_for_just_min_tokens() -> None:
    rules = StopRules(frozenset({END}))
    sequence = answer([], min_tokens=3, stop_token_ids=(STOP,))
    ignoring = answer([], min_tokens=3, stop_token_ids=(STOP,), ignore_eos=True)
    sequences = [*[sequence] * 4, ignoring]
    rows = sample_rows([each.sampling for each in sequences])
    set_steps(rows, np.asarray([0, 2, 3, 4, 0]))
    expected = [(0, END), (0, STOP), (1, END), (1, STOP), (4, STOP)]
    assert forbidden_tokens(rows, sequences, rules) == expected


def test_a_stop_string_counts_from_min_tokens_on() -> None:
    text = b"ab.cd.ef"
    assert len(answer(text, stop_strings=(".",)).output_ids) == 3
    assert len(answer(text, stop_strings=("b.c",), min_tokens=4).output_ids) == 4
    late = answer(text, stop_strings=(".c",), min_tokens=8)
    assert (len(late.output_ids), late.finish_reason) == (8, None)  # its only one came too early


@pytest.mark.parametrize(
    ("text", "stop", "min_tokens", "kept"),
    [
        ("ab.cd.ef", ".", 0, "ab"),
        ("ab.cd.ef", ".", 4, "ab.cd"),
        ("x\u00e9x\u00e9", "\u00e9", 4, "x\u00e9x"),
        ("a.bc..d", "..", 3, "a.bc"),
    ],
)
def test_an_answer_ends_where_the_stop_string_that_counts_begins(
    text: str, stop: str, min_tokens: int, kept: str
) -> None:
    found = answer(text.encode(), stop_strings=(stop,), min_tokens=min_tokens)
    seen = bytes(found.output_ids).decode()
    assert found.stop_reason == stop and seen[: len(seen) - found.num_cut] == kept


@pytest.mark.parametrize("stop", ["😀", "😀😀😀😀😀", "né"])
def test_a_stop_string_is_found_as_soon_as_its_last_byte_comes(stop: str) -> None:
    before = ("-" * 20).encode()
    found = answer(before + stop.encode() + b"--", stop_strings=(stop, "not there"))
    assert len(found.output_ids) == len(before) + len(stop.encode())
    assert (found.finish_reason, found.stop_reason) == ("stop", stop)


def test_the_end_of_the_answer_is_searched_and_not_all_of_it() -> None:
    detokenize = Bytes()
    answer(b"-" * 49, stop_strings=("😀😀", "x"), detokenize=detokenize)
    assert 8 + 3 <= detokenize.longest <= 16  # the bytes of two characters, and those of one that a cut may break


def test_of_two_stop_strings_the_first_in_the_text_is_named() -> None:
    assert answer(b"a.b", stop_strings=("a.b", ".b")).stop_reason == "a.b"


def test_an_end_token_ends_an_answer_unless_it_is_to_be_ignored() -> None:
    assert len(answer([7, END, 7, STOP, 7]).output_ids) == 2
    assert len(answer([7, END, 7, STOP, 7], ignore_eos=True, stop_token_ids=(STOP,)).output_ids) == 4
