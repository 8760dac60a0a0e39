"""Published datasets as manifests: each config makes the right questions from small files as they are published.

Splits, rows without answers, ids and videos are chosen before anything is generated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.evaluate import EvaluateConfig, caption_config
from pipeline.config import InputConfig
from pipeline.config_file import load_config
from pipeline.errors import ManifestError
from pipeline.evaluation.layout import Layout
from pipeline.evaluation.published_set import prepare_manifest
from pipeline.evaluation.scoring import Scorer
from pipeline.manifest.find import open_manifest
from pipeline.schema import result_schema
from tests.unit.evaluation.published_sets import NEXTQA_NUMBERS, PICTURE, SETS, PublishedSet

CONFIGS = Path(__file__).parents[3] / "configs" / "evaluation"


def test_every_published_dataset_has_a_test() -> None:
    assert set(SETS) == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize(("name", "one"), [*SETS.items(), ("nextqa", NEXTQA_NUMBERS)])
def test_a_published_dataset_becomes_questions_that_are_scored_as_in_its_paper(
    name: str, one: PublishedSet, tmp_path: Path
) -> None:
    source = tmp_path / "set"
    answers = {one.split: one.row[one.answer], **one.other_splits}
    for split, answer in answers.items():
        row = {**dict.fromkeys(one.columns), **one.row, one.answer: answer}
        write(source / f"{split}-00000-of-00001.parquet", [row], pa.schema(list(one.columns.items())))
    for folder, video in (("data", "fFjv93ACGo8.mkv"), ("NExTVideo", "4010069381.mp4")):
        (source / folder).mkdir()
        (source / folder / video).touch()
    config = load(name, source, tmp_path / "out")
    made = caption_config(config)
    [asked] = pq.read_table(made.input.path).to_pylist()
    assert asked["prompt"] == one.prompt
    assert asked["reference"] == one.references
    assert asked["id"] == one.id
    assert Path(asked["video"]).is_file() if "video" in asked else len(asked["images"]) == one.num_images
    assert all(image["bytes"] == PICTURE["bytes"] for image in asked.get("images", ()))
    assert str(source) in made.input.allow
    assert set(config.evaluate.scoring.columns) <= set(asked)
    groups = {"video_id", "videoID", "video", "image_id", "docId"} & set(one.columns)
    assert (config.evaluate.cluster is None) == (not groups), "questions about one video or picture belong together"
    assert score(config, asked, one.right) == 1 or name == "coco_captions"
    assert score(config, asked, "no idea at all, sorry") == 0
    for split in one.other_splits:
        if split not in ("train", "dev"):
            with pytest.raises(ManifestError, match=f"none of the 1 rows has an answer in the column {one.answer}"):
                caption_config(load(name, source, tmp_path / split, split))


def load(name: str, source: Path, output: Path, split: str | None = None) -> EvaluateConfig:
    overrides = {"input.path": str(source), "output.path": str(output)}
    if split:
        overrides["evaluate.layout.split"] = split
    return load_config(EvaluateConfig, str(CONFIGS / f"{name}.yaml"), overrides)


def score(config: EvaluateConfig, row: dict[str, Any], text: str) -> float:
    """The row's score, were this the model's answer."""
    settings = config.evaluate.scoring
    kept = {name: row[name] for name in settings.columns}
    types = {name: pa.array([value]).type for name, value in kept.items()}
    schema = result_schema(pa.schema(list(types.items())))
    result = {"id": "1", "text": text, "status": "ok", "attempts": 1, "manifest_file": 0, "manifest_row": 0, **kept}
    batch = pa.RecordBatch.from_pylist([result], schema=schema)
    scorer = Scorer(settings)
    scorer.learn([batch])
    value = scorer.score(batch).column("score")[0].as_py()
    assert isinstance(value, float)
    return value


def write(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)


def ask(folder: Path, layout: Layout, path: str = "set", limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of the manifest that is made of a dataset."""
    made = prepare_manifest(layout, InputConfig(path=str(folder / path), limit=limit), str(folder / "made"))
    return pq.read_table(made.path).to_pylist()


def notes(folder: Path) -> str:
    """What a job over the manifest says first."""
    return "; ".join(open_manifest(str(folder / "made"), listing_path=str(folder / "listing")).notes)


HUB = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation.parquet", "test-0.parquet"]
DEVS = ["test-0.parquet", "testdev-0.parquet", "test_dev-0.parquet"]
FOLDERS = ["default/dev/0000.parquet", "default/validation/0000.parquet"]


@pytest.mark.parametrize(
    ("names", "path", "split", "found"),
    [
        (HUB, "set", "train", HUB[:2]),
        (HUB, "set", "VALIDATION", HUB[2:3]),
        (HUB, "set", "t*", [HUB[3], *HUB[:2]]),
        (HUB, "set", None, "holds several splits: test, train, validation; set evaluate.layout.split"),
        (HUB, "set", "val", "no file of the split val; by the files' names it holds test, train, validation"),
        (HUB, "set/val*.parquet", None, HUB[2:3]),
        (HUB, "set/test-0.parquet", "validation", "by the files' names it holds test"),
        (DEVS, "set", "test", DEVS[:1]),
        (DEVS, "set", "testdev", DEVS[1:2]),
        (FOLDERS, "set", "validation", FOLDERS[1:]),
        (FOLDERS, "set/default/dev", None, FOLDERS[:1]),
        (["val2014.parquet", "test2015.parquet"], "set", "val", ["val2014.parquet"]),
        (["humans/0.parquet", "machines/test.parquet"], "set", "humans", ["humans/0.parquet"]),
        (["a.parquet", "b.parquet"], "set", "validation", ["a.parquet", "b.parquet"]),
        (["a.parquet", "b.parquet"], "set", None, ["a.parquet", "b.parquet"]),
    ],
)
def test_a_split_is_told_by_the_names_of_files_and_folders(
    tmp_path: Path, names: list[str], path: str, split: str | None, found: list[str] | str
) -> None:
    for name in names:
        write(tmp_path / "set" / name, [{"q": name, "answer": "1"}])
    layout = Layout(prompt="{q}", split=split)
    if isinstance(found, str):
        with pytest.raises(ManifestError, match=found):
            ask(tmp_path, layout, path)
    else:
        assert [row["prompt"] for row in ask(tmp_path, layout, path)] == found


def test_a_split_is_told_by_a_column(tmp_path: Path) -> None:
    rows = [{"q": f"q{number}", "part": part, "answer": "1"} for number, part in enumerate(["test", "dev", "test"])]
    write(tmp_path / "set" / "train.parquet", rows)
    layout = Layout(prompt="{q}", split="test", split_column="part")
    assert [row["prompt"] for row in ask(tmp_path, layout)] == ["q0", "q2"]
    with pytest.raises(ManifestError, match="no row has the split val: part holds test, dev"):
        ask(tmp_path / "other", Layout(prompt="{q}", split="val", split_column="part"), "../set")
    with pytest.raises(ValueError, match="split_column needs split"):
        Layout(prompt="{q}", split_column="part")


def test_rows_without_an_answer_are_left_out_before_they_are_asked_and_said_once(tmp_path: Path) -> None:
    answers = ["A", "?", None, "b", "", "(A)", " ", "nan", "B"]
    rows = [{"q": f"q{number}", "options": ["x", "y"], "answer": answer} for number, answer in enumerate(answers)]
    write(tmp_path / "set" / "test.parquet", rows)
    layout = Layout(prompt="{q}\n{choices}", choices=["options"], answer_is="letter")
    assert [row["reference"] for row in ask(tmp_path, layout)] == [["A"], ["B"], ["A"], ["B"]]
    assert notes(tmp_path) == "5 of 9 rows have no answer in the column answer and are left out"
    (tmp_path / "made" / "_layout.json").unlink()
    assert len(ask(tmp_path, layout, limit=2)) == 2, "the limit counts rows that are asked"


def test_hidden_answers_of_a_set_are_named_by_its_layout(tmp_path: Path) -> None:
    rows = [{"q": "q0", "a0": "x", "a1": "y", "answer": answer} for answer in (-1, 1)]
    write(tmp_path / "set" / "test.parquet", rows)
    layout = Layout(prompt="{q}", choices=["a0", "a1"], answer_is="index")
    with pytest.raises(ManifestError, match=r"row 0 of .*test\.parquet: column answer holds -1; .*layout\.no_answer"):
        ask(tmp_path, layout)
    assert not (tmp_path / "made").exists()
    assert len(ask(tmp_path, layout.model_copy(update={"no_answer": ["-1"]}))) == 1


def test_ids_that_are_empty_or_shared_are_said(tmp_path: Path) -> None:
    keys = [("v1", 0), ("v2", 0), ("v2", 1), ("v3", None)]
    write(tmp_path / "set" / "test.parquet", [{"v": v, "qid": qid, "answer": "1"} for v, qid in keys])
    layout = Layout(prompt="{v}", id="{v}-{qid}")
    assert [row["id"] for row in ask(tmp_path, layout)] == ["v1-0", "v2-0", "v2-1", None]
    assert notes(tmp_path) == "1 rows have no id: an empty column in {v}-{qid}"
    alone = tmp_path / "alone"
    ask(alone, Layout(prompt="{v}", id="{qid}"), "../set")
    assert "2 rows share their id with another, such as 0" in notes(alone)


def test_videos_are_found_by_their_name_with_any_extension(tmp_path: Path) -> None:
    videos = tmp_path / "set" / "data"
    rows = [{"v": name, "answer": "1"} for name in ("one", "two.mp4", "a.b", "gone", "both")]
    write(tmp_path / "set" / "test.parquet", rows)
    layout = Layout(prompt="{v}", video="data/{v}")
    with pytest.raises(ManifestError, match=r"none of the videos of 5 rows is there: no .*/set/data/one with any"):
        ask(tmp_path, layout)
    videos.mkdir()
    for name in ("one.MP4", "two.mkv", "a.b.webm", "gone.txt", "both.avi", "both.mp4"):
        (videos / name).touch()
    names = [Path(row["video"]).name for row in ask(tmp_path, layout)]
    assert names == ["one.MP4", "two.mkv", "a.b.webm", "gone.mp4", "both.mp4"]
    (videos / "gone.mkv").touch()
    assert Path(ask(tmp_path, layout)[3]["video"]).name == "gone.mkv", "found once it is there"


def test_the_manifest_is_made_once_and_another_layout_is_refused(tmp_path: Path) -> None:
    source, target = InputConfig(path=str(tmp_path / "set.parquet"), allow=["other"]), str(tmp_path / "made")
    pq.write_table(pa.table({"q": ["a", "b"], "answer": ["1", None]}), source.path)
    layout = Layout(prompt="{q}?")
    made = prepare_manifest(layout, source, target)
    assert notes(tmp_path).startswith("1 of 2 rows")
    assert made.path == target and made.format == "parquet" and made.allow == ["other", str(tmp_path)]
    before = (tmp_path / "made" / "rows-00000.parquet").stat().st_mtime_ns
    assert prepare_manifest(layout, source, target) == made
    assert (tmp_path / "made" / "rows-00000.parquet").stat().st_mtime_ns == before
    assert pq.read_table(target).column("reference").to_pylist() == [["1"]]
    marker = tmp_path / "made" / "_layout.json"
    recorded = marker.read_text()
    pq.write_table(pa.table({"q": ["b", "a"], "answer": ["1", None]}), source.path)
    with pytest.raises(ManifestError, match="another layout or source"):
        prepare_manifest(layout, source, target)
    without_digests = json.loads(recorded)  # as earlier versions wrote it
    without_digests["source"]["files"] = [file[:3] for file in without_digests["source"]["files"]]
    marker.write_text(json.dumps(without_digests))
    assert prepare_manifest(layout, source, target) == made
    with pytest.raises(ManifestError, match="another layout or source"):
        prepare_manifest(Layout(prompt="{q}!"), source, target)


@pytest.mark.parametrize(
    ("num_rows", "limit", "sizes"), [(7, None, [3, 3, 1]), (6, None, [3, 3]), (7, 4, [3, 1]), (0, None, [0])]
)
def test_a_manifest_is_written_in_files_of_limited_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, limit: int | None, sizes: list[int]
) -> None:
    monkeypatch.setattr("pipeline.evaluation.published_set._ROWS_PER_FILE", 3)
    monkeypatch.setattr("pipeline.evaluation.published_set._ROWS_PER_GROUP", 2)
    source = InputConfig(path=str(tmp_path / "set.parquet"), limit=limit)
    write(tmp_path / "made" / "rows-00003.parquet", [{"prompt": "of an attempt that was cut off"}])
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
