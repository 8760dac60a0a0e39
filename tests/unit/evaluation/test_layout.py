"""A published dataset's rows as questions: prompts, options, images in their places, answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.evaluate import EvaluateConfig
from pipeline.config_file import load_config
from pipeline.errors import ConfigError, ManifestError
from pipeline.evaluation.layout import Layout, fill, manifest_row
from tests.unit.evaluation.published_sets import SETS, WORD

CONFIGS = Path(__file__).parents[3] / "configs" / "evaluation"


def _mmmu() -> Layout:
    layout = load_config(EvaluateConfig, str(CONFIGS / "mmmu.yaml"), {}).evaluate.layout
    assert layout is not None
    return layout


def test_images_are_placed_where_the_question_marks_them() -> None:
    row = {
        **SETS["mmmu"].row,
        "question": "<image 2> then <image 1>, again <image 2>",
        "image_3": {"bytes": b"3", "path": None},
    }
    row["image_1"], row["image_2"] = {"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}
    made = manifest_row(_mmmu(), row)
    assert [image["bytes"] for image in made["images"]] == [b"3", b"2", b"1"], "the unmentioned one first"
    parts = json.loads(made["messages"])[0]["content"]
    assert [part["type"] for part in parts] == ["image", "image", "text", "image", "text"]
    assert parts[2]["text"] == " then " and "again <image 2>" in parts[4]["text"]


def test_open_questions_get_their_own_prompt_and_keep_all_right_answers() -> None:
    row = {
        **SETS["mmmu"].row,
        "question_type": "open",
        "options": "[]",
        "answer": "['6.3', '6.30']",
        "question": "<image 1>?",
    }
    made = manifest_row(_mmmu(), row)
    assert made["prompt"] == f"<image 1>?\n\n{WORD}"
    assert made["reference"] == ["6.3", "6.30"] and made["task"] == "open" and made["choices"] == []


def test_lines_without_any_value_are_left_out() -> None:
    template = "Hint: {hint}\n{question}\n\nShort."
    assert fill(template, {"hint": None, "question": "Why?"}) == "Why?\n\nShort."
    assert fill(template, {"hint": "look", "question": "Why?"}) == "Hint: look\nWhy?\n\nShort."
    assert fill("{{literal}} {a}", {"a": 1}) == "{literal} 1"


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>5}", "{}"])
def test_templates_are_plain(template: str) -> None:
    with pytest.raises(ValueError, match="plain column name"):
        Layout(prompt=template)


@pytest.mark.parametrize("answer", ["E", "AB", "A, B", "C", "-", "0"])
def test_a_letter_that_names_no_option_is_refused(answer: str) -> None:
    layout = Layout(prompt="{choices}", choices=["options"], answer_is="letter")
    options = ["x", "y", None, "z"]
    assert manifest_row(layout, {"options": options, "answer": "(d)"})["reference"] == ["D"]
    with pytest.raises(ManifestError, match=r"column answer holds .*; expected the letter of one of 4 options"):
        manifest_row(layout, {"options": options, "answer": answer})


@pytest.mark.parametrize("answer", [9, -1, "two", 1.5, 2])
def test_a_number_that_names_no_option_is_refused(answer: Any) -> None:
    layout = Layout(prompt="{choices}", choices=["a", "b", "c", "d"], answer_is="index")
    row = {"a": "x", "b": "y", "c": "nan", "d": "z"}
    made = manifest_row(layout, {**row, "answer": 3.0})
    assert made["reference"] == ["D"] and made["prompt"] == "A. x\nB. y\nD. z", "a missing option keeps its letter"
    with pytest.raises(ManifestError, match=r"column answer holds .*; expected the number, from 0, of one of 4"):
        manifest_row(layout, {**row, "answer": answer})


def test_there_are_as_many_options_as_letters() -> None:
    layout = Layout(prompt="{choices}", choices=["options"], answer_is="index")
    options = [f"option {number}" for number in range(27)]
    made = manifest_row(layout, {"options": options[:26], "answer": "25"})
    assert made["reference"] == ["Z"] and made["prompt"].endswith("Z. option 25")
    with pytest.raises(ManifestError, match="a row has 27 options; expected at most 26"):
        manifest_row(layout, {"options": options, "answer": "0"})


def test_numbers_are_written_without_a_point() -> None:
    made = manifest_row(Layout(prompt="{n}?", id="{n}", keep=["m"]), {"n": 3.0, "m": float("nan"), "answer": 14.0})
    assert (made["prompt"], made["id"], made["m"], made["reference"]) == ("3?", "3", None, ["14"])


def test_a_box_in_text_is_one_answer() -> None:
    assert manifest_row(Layout(prompt="?"), {"answer": "[10, 20]"})["reference"] == ["[10, 20]"]


def test_an_id_is_made_of_columns_and_kept_columns_keep_their_names() -> None:
    with pytest.raises(ValueError, match=r"'qid' is the same for every row; write columns in braces, as in \{qid\}"):
        Layout(prompt="?", id="qid")
    with pytest.raises(ValueError, match="status, video would collide"):
        Layout(prompt="?", keep=["video", "status", "qid"])


def test_layouts_can_be_overridden_on_the_command_line() -> None:
    path = str(CONFIGS / "ai2d.yaml")
    config = load_config(EvaluateConfig, path, {"evaluate.layout.prompt": "{question} {choices}"})
    assert config.evaluate.layout is not None and config.evaluate.layout.prompt == "{question} {choices}"
    with pytest.raises(
        ConfigError, match=r"evaluate\.layout\.propmt: unknown key; did you mean evaluate\.layout\.prompt"
    ):
        load_config(EvaluateConfig, path, {"evaluate.layout.propmt": "x"})
