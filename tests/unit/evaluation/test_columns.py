"""Columns of result rows as texts, whatever the columns hold."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.evaluation.columns import answer_texts, option_texts, reference_lists, text_column


def batch(column: pa.Array) -> pa.RecordBatch:
    return pa.record_batch({"x": column})


def test_numbers_texts_and_structs_are_texts() -> None:
    assert text_column(batch(pa.array([1, None])), "x").to_pylist() == ["1", None]
    assert text_column(batch(pa.array(["a", None]).dictionary_encode()), "x").to_pylist() == ["a", None]
    assert text_column(batch(pa.array([{"a": 1}, None])), "x").to_pylist() == ["{'a': 1}", None]
    assert reference_lists(batch(pa.array([["a", None, "b"], None])), "x") == [["a", "b"], []]


def test_a_value_that_python_cannot_hold_ends_nothing() -> None:
    latin = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"caf\xe9"], pa.binary()).buffers())
    late = pa.array([0, 4_000_000], pa.int32()).cast(pa.date32())
    zone = pa.array([0, None], pa.int64()).cast(pa.timestamp("us")).cast(pa.timestamp("us", tz="Mars/Phobos"))
    texts = text_column(batch(latin), "x").to_pylist()
    assert texts[0] == "ok" and "the column x holds a value of type string that can't be read" in texts[1]
    assert reference_lists(batch(latin), "x")[0] == ["ok"]
    assert "type date32" in reference_lists(batch(late), "x")[1][0]
    assert "type timestamp" in text_column(batch(zone), "x").to_pylist()[0]
    assert text_column(batch(zone), "x").to_pylist()[1] is None


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ([{"answer": "Three."}, {"answer": "x"}], ["Three.", "x"]),
        ('[{"answer": "Three.", "answer_id": 1}, {"answer": "x", "answer_id": 2}]', ["Three.", "x"]),
        ('["Three.", "x"]', ["Three.", "x"]),
        ("['Three.', 'x']", ["Three.", "x"]),
        ("Three.", ["Three."]),
        ("[Three", ["[Three"]),
        ("[10, 20, 30, 40]", ["[10, 20, 30, 40]"]),
        ('["10", 20]', ["10", "20"]),
        ("[null]", []),
        (3.0, ["3"]),
        ([3.0, 2.5], ["3", "2.5"]),
        (["yes", "", None], ["yes", ""]),
        ("", []),
        ([], []),
        ("[]", []),
        (None, []),
        (float("nan"), []),
        ([""] * 10, []),
        ([{"answer": ""}, {"answer": None}], []),
    ],
)
def test_references_in_every_form_in_which_sets_publish_them(value: Any, texts: list[str]) -> None:
    assert answer_texts(value) == texts


def test_options_may_be_text_and_a_missing_one_keeps_its_place() -> None:
    assert option_texts('["cat", "dog"]') == option_texts("['cat', 'dog']") == option_texts(["cat", "dog"])
    assert option_texts("[1, 2.0]") == ["1", "2"]
    assert option_texts(["cat", None, "dog", None, float("nan")]) == ["cat", "", "dog"]
