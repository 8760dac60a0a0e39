"""Published datasets: each config's layout makes the right questions from a small file with the dataset's columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.evaluate import EvaluateConfig, caption_config
from pipeline.config import InputConfig
from pipeline.config_file import load_config
from pipeline.errors import ConfigError, ManifestError
from pipeline.evaluation.layout import Layout, fill, manifest_row, prepare_manifest
from pipeline.evaluation.scoring import Scorer
from pipeline.schema import result_schema

CONFIGS = Path(__file__).parents[3] / "configs" / "evaluation"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PICTURE = {"bytes": b"\x89PNG", "path": None}
LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
STRINGS = pa.list_(pa.string())


def _image_columns(count: int) -> dict[str, pa.DataType]:
    return {f"image_{number}": IMAGE for number in range(1, count + 1)}


# For each dataset: the published columns (some of them unused), a row, its prompt, its references, and a right answer.
SETS: dict[str, tuple[dict[str, Any], dict[str, Any], str, list[str], str]] = {
    "coco_captions": (
        {"question_id": pa.string(), "image": IMAGE, "question": pa.string(), "answer": STRINGS, "id": pa.int64()},
        {"question_id": "COCO_val2014_1.jpg", "image": PICTURE, "question": "?", "answer": ["a cat", "one cat"]},
        "Provide a one-sentence caption for the provided image.",
        ["a cat", "one cat"],
        "a cat",
    ),
    "vqav2": (
        {
            "question_id": pa.int64(), "image": IMAGE, "question": pa.string(), "question_type": pa.string(),
            "answer_type": pa.string(), "multiple_choice_answer": pa.string(),
            "answers": pa.list_(pa.struct([("answer", pa.string()), ("answer_confidence", pa.string())])),
        },
        {
            "question_id": 7, "image": PICTURE, "question": "What colour?", "question_type": "what",
            "answer_type": "other", "multiple_choice_answer": "red",
            "answers": [{"answer": "red", "answer_confidence": "yes"}] * 10,
        },
        f"What colour?\n{WORD}",
        ["red"] * 10,
        "red",
    ),
    "textvqa": (
        {"question_id": pa.int32(), "image": IMAGE, "question": pa.string(), "answers": STRINGS, "ocr_tokens": STRINGS},
        {"question_id": 3, "image": PICTURE, "question": "What brand?", "answers": ["nokia"] * 10, "ocr_tokens": ["N"]},
        f"What brand?\n{WORD}",
        ["nokia"] * 10,
        "Nokia",
    ),
    "docvqa": (
        {"questionId": pa.string(), "question": pa.string(), "image": IMAGE, "answers": STRINGS, "docId": pa.string()},
        {"questionId": "9", "question": "What date?", "image": PICTURE, "answers": ["1/8/93", "1 Aug 93"]},
        f"What date?\n{WORD}",
        ["1/8/93", "1 Aug 93"],
        "1/8/93",
    ),
    "chartqa": (
        {"type": pa.string(), "question": pa.string(), "answer": pa.string(), "image": IMAGE},
        {"type": "human_test", "question": "How many?", "answer": "14", "image": PICTURE},
        "How many?\nAnswer the question with a single word.",
        ["14"],
        "14.5",
    ),
    "ai2d": (
        {"question": pa.string(), "options": STRINGS, "answer": pa.string(), "image": IMAGE},
        {"question": "Which part?", "options": ["leaf", "root", "stem", "2"], "answer": "2", "image": PICTURE},
        f"Which part?\nA. leaf\nB. root\nC. stem\nD. 2\n{LETTER}",
        ["C"],
        "C",
    ),
    "mmbench": (
        {
            "index": pa.int64(), "question": pa.string(), "hint": pa.string(), "answer": pa.string(),
            **dict.fromkeys("ABCD", pa.string()), "category": pa.string(), "image": IMAGE, "source": pa.string(),
            "L2-category": pa.string(), "comment": pa.string(), "split": pa.string(),
        },
        {
            "index": 5, "question": "Which one?", "hint": "nan", "answer": "B", "A": "left", "B": "None", "C": "nan",
            "D": "nan", "category": "spatial", "image": PICTURE, "source": "x", "L2-category": "logic",
            "comment": "nan", "split": "dev",
        },
        f"Which one?\nA. left\nB. None\n{LETTER}",
        ["B"],
        "(B)",
    ),
    "mmmu": (
        {
            "id": pa.string(), "question": pa.string(), "options": pa.string(), "explanation": pa.string(),
            **_image_columns(7), "img_type": pa.string(), "answer": pa.string(), "topic_difficulty": pa.string(),
            "question_type": pa.string(), "subfield": pa.string(),
        },
        {
            "id": "validation_Art_1", "question": "Compare <image 1> with <image 2>.",
            "options": "['same', \"it's not\"]", **dict.fromkeys(_image_columns(7)),
            "image_1": PICTURE, "image_2": PICTURE,
            "img_type": "['Photo']", "answer": "B", "topic_difficulty": "Easy", "question_type": "multiple-choice",
            "subfield": "Drawing",
        },
        f"Compare <image 1> with <image 2>.\nA. same\nB. it's not\n\n{LETTER}",
        ["B"],
        "B",
    ),
    "video_mme": (
        {
            "video_id": pa.string(), "duration": pa.string(), "domain": pa.string(), "sub_category": pa.string(),
            "url": pa.string(), "videoID": pa.string(), "question_id": pa.string(), "task_type": pa.string(),
            "question": pa.string(), "options": STRINGS, "answer": pa.string(),
        },
        {
            "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Law", "url": "https://x",
            "videoID": "fFjv93ACGo8", "question_id": "001-1", "task_type": "Counting Problem", "question": "How many?",
            "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."], "answer": "C",
        },
        "Select the best answer to the following multiple-choice question based on the video.\nHow many?\n"
        "A. One.\nB. Two.\nC. Three.\nD. Four.\nRespond with only the letter of the correct option.",
        ["C"],
        "C. Three.",
    ),
    "nextqa": (
        {
            "video": pa.int64(), "frame_count": pa.int64(), "question": pa.string(), "answer": pa.int64(),
            "qid": pa.int64(), "type": pa.string(), **{f"a{number}": pa.string() for number in range(5)},
        },
        {
            "video": 4010069381, "frame_count": 369, "question": "how do the two men play the instrument", "answer": 0,
            "qid": 6, "type": "CH", "a0": "roll the handle", "a1": "tap their feet", "a2": "strum", "a3": "hit",
            "a4": "pat",
        },
        "how do the two men play the instrument?\nA. roll the handle\nB. tap their feet\nC. strum\nD. hit\nE. pat\n"
        f"{LETTER}",
        ["A"],
        "A",
    ),
}  # fmt: skip


def test_every_published_dataset_has_a_test() -> None:
    assert set(SETS) == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("name", SETS)
def test_a_published_dataset_becomes_questions_that_are_scored_as_in_its_paper(name: str, tmp_path: Path) -> None:
    columns, row, prompt, references, right = SETS[name]
    schema = pa.schema(list(columns.items()))
    source = tmp_path / "set"
    source.mkdir()
    pq.write_table(pa.Table.from_pylist([row, row], schema=schema), source / "validation-0.parquet")
    overrides = {"input.path": str(source), "output.path": str(tmp_path / "out"), "input.limit": "1"}
    config = load_config(EvaluateConfig, str(CONFIGS / f"{name}.yaml"), overrides)
    made = caption_config(config)
    asked = pq.read_table(made.input.path).to_pylist()
    assert len(asked) == 1
    assert asked[0]["prompt"] == prompt
    assert asked[0]["reference"] == references
    if name in ("video_mme", "nextqa"):
        stem = row.get("videoID") or row["video"]
        assert asked[0]["video"].startswith(str(source)) and asked[0]["video"].endswith(f"/{stem}.mp4")
        assert str(source) in made.input.allow
    else:
        assert [image["bytes"] for image in asked[0]["images"]] == [PICTURE["bytes"]] * (2 if name == "mmmu" else 1)
    assert _score(config, asked[0], right) == 1 or name == "coco_captions"
    assert _score(config, asked[0], "no idea at all, sorry") == 0


def _score(config: EvaluateConfig, row: dict[str, Any], text: str) -> float:
    """The row's score, were this the model's answer."""
    settings = config.evaluate.scoring
    kept = {name: row.get(name) for name in settings.columns}
    types = {name: pa.array([value]).type for name, value in kept.items()}
    schema = result_schema(pa.schema(list(types.items())))
    result = {"id": "1", "text": text, "status": "ok", "attempts": 1, "manifest_file": 0, "manifest_row": 0, **kept}
    batch = pa.RecordBatch.from_pylist([result], schema=schema)
    scorer = Scorer(settings)
    scorer.learn([batch])
    value = scorer.score(batch).column("score")[0].as_py()
    assert isinstance(value, float)
    return value


def _mmmu() -> Layout:
    layout = load_config(EvaluateConfig, str(CONFIGS / "mmmu.yaml"), {}).evaluate.layout
    assert layout is not None
    return layout


def test_images_are_placed_where_the_question_marks_them() -> None:
    row = {
        **SETS["mmmu"][1],
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
        **SETS["mmmu"][1],
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


@pytest.mark.parametrize(("answer", "form"), [("E", "letter"), ("9", "index"), ("two", "index")])
def test_an_answer_that_names_no_option_is_refused(answer: str, form: str) -> None:
    layout = Layout(prompt="{choices}", choices=["options"], answer_is=form)  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match="column answer holds"):
        manifest_row(layout, {"options": ["x", "y"], "answer": answer})


def test_the_manifest_is_made_once_and_another_layout_is_refused(tmp_path: Path) -> None:
    source, target = InputConfig(path=str(tmp_path / "set.parquet"), allow=["other"]), str(tmp_path / "made")
    pq.write_table(pa.table({"q": ["a", "b"], "answer": ["1", None]}), source.path)
    layout = Layout(prompt="{q}?")
    made = prepare_manifest(layout, source, target)
    assert made.path == target and made.format == "parquet" and made.allow == ["other", str(tmp_path)]
    before = (tmp_path / "made" / "rows-00000.parquet").stat().st_mtime_ns
    assert prepare_manifest(layout, source, target) == made
    assert (tmp_path / "made" / "rows-00000.parquet").stat().st_mtime_ns == before
    assert pq.read_table(target).column("reference").to_pylist() == [["1"], []]
    with pytest.raises(ManifestError, match="another layout or source"):
        prepare_manifest(Layout(prompt="{q}!"), source, target)


@pytest.mark.parametrize(
    ("num_rows", "limit", "sizes"), [(7, None, [3, 3, 1]), (6, None, [3, 3]), (7, 4, [3, 1]), (0, None, [0])]
)
def test_a_manifest_is_written_in_files_of_limited_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, limit: int | None, sizes: list[int]
) -> None:
    monkeypatch.setattr("pipeline.evaluation.layout._ROWS_PER_FILE", 3)
    monkeypatch.setattr("pipeline.evaluation.layout._ROWS_PER_GROUP", 2)
    source = InputConfig(path=str(tmp_path / "set.parquet"), limit=limit)
    questions = pa.array([f"q{row}" for row in range(num_rows)], pa.string())
    pq.write_table(pa.table({"q": questions, "answer": questions}), source.path)
    made = prepare_manifest(Layout(prompt="{q}"), source, str(tmp_path / "made"))
    files = sorted((tmp_path / "made").glob("*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == sizes
    assert pq.read_table(made.path).column("prompt").to_pylist() == questions.to_pylist()[:limit]


def test_a_missing_column_of_the_dataset_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"frage": ["a"], "answer": ["1"]}), tmp_path / "set.parquet")
    with pytest.raises(ManifestError, match=r"no column question; its columns: frage, answer"):
        prepare_manifest(
            Layout(prompt="{question}"), InputConfig(path=str(tmp_path / "set.parquet")), str(tmp_path / "made")
        )


def test_layouts_can_be_overridden_on_the_command_line() -> None:
    path = str(CONFIGS / "ai2d.yaml")
    config = load_config(EvaluateConfig, path, {"evaluate.layout.prompt": "{question} {choices}"})
    assert config.evaluate.layout is not None and config.evaluate.layout.prompt == "{question} {choices}"
    with pytest.raises(
        ConfigError, match=r"evaluate\.layout\.propmt: unknown key; did you mean evaluate\.layout\.prompt"
    ):
        load_config(EvaluateConfig, path, {"evaluate.layout.propmt": "x"})
