"""Columns of result rows as texts, whatever the columns hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from pipeline.evaluation.columns import answer_texts, option_lists, option_texts, reference_lists, text_column
from pipeline.manifest.find import open_manifest
from pipeline.manifest.formats import read_units


def batch(column: pa.Array) -> pa.RecordBatch:
    return pa.record_batch({"x": column})


def test_numbers_texts_and_structs_are_texts() -> None:
    assert text_column(batch(pa.array([1, None])), "x").to_pylist() == ["1", None]
    assert text_column(batch(pa.array(["a", None]).dictionary_encode()), "x").to_pylist() == ["a", None]
    assert text_column(batch(pa.array([b"a", b"\xff"])), "x").to_pylist() == ["a", "\\xff"]
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
        ("zwölf\nUhr".encode(), ["zwölf\nUhr"]),
        ([b"Three.", None, b"x"], ["Three.", "x"]),
        ([{"answer": b"Three."}], ["Three."]),
        (b'["Three.", "x"]', ["Three.", "x"]),
        (b"[10, 20, 30, 40]", ["[10, 20, 30, 40]"]),
        (b"caf\xe9", ["caf\\xe9"]),
        (b"", []),
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


ANSWERS = ["Three.", ["Three.", "x"], [{"answer": "Three."}, {"answer": "x"}], "['Three.', 'x']", 3, "", [], None]


def test_references_of_text_manifests_are_read_where_rows_differ_in_form(tmp_path: Path) -> None:
    rows = [{"prompt": "?", "reference": answer, "options": ["a", "b"]} for answer in ANSWERS]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    as_text = [row | {"reference": json.dumps(row["reference"]) if row["reference"] else ""} for row in rows[1:3]]
    pd.DataFrame(as_text).to_csv(tmp_path / "two.csv", index=False)
    found = {}
    for name in ("one.jsonl", "two.csv"):
        manifest = open_manifest(str(tmp_path / name), listing_path=str(tmp_path / "listing"))
        unit = manifest.unit(0, 0, manifest.files[0].num_rows)
        [table] = read_units(manifest.spec, [unit], columns=["reference", "options"])
        [found[name]] = pa.table(table).combine_chunks().to_batches()
    both = ["Three.", "x"]
    assert reference_lists(found["one.jsonl"], "reference") == [["Three."], both, both, both, ["3"], [], [], []]
    assert reference_lists(found["two.csv"], "reference") == [both, both]
    assert option_lists(found["two.csv"], "options") == [["a", "b"]] * 2


def test_whole_numbers_that_pandas_writes_beside_a_null_have_no_point() -> None:
    table = pa.Table.from_pandas(pd.DataFrame({"x": [3, None, 2.5]}))
    assert reference_lists(table.to_batches()[0], "x") == [["3"], [], ["2.5"]]


def test_options_may_be_text_and_a_missing_one_keeps_its_place() -> None:
    assert option_texts('["cat", "dog"]') == option_texts("['cat', 'dog']") == option_texts(["cat", "dog"])
    assert option_texts(b'["cat", "dog"]') == option_texts([b"cat", b"dog"]) == ["cat", "dog"]
    assert option_texts("[1, 2.0]") == ["1", "2"]
    assert option_texts(["cat", None, "dog", None, float("nan")]) == ["cat", "", "dog"]
