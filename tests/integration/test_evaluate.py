"""The evaluation job: scoring a run folder, comparing with another, canary rows, what it asks the caption job for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import caption
from jobs.evaluate import EvaluateConfig, main
from pipeline.config import CaptionConfig
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.evaluation.canaries import compare_canaries
from pipeline.manifest.row_set import RowNumbering
from pipeline.results.fragments import FragmentWriter
from pipeline.results.parts import finalise
from pipeline.results.reader import RunReader
from pipeline.results.run_folder import RunFolder
from pipeline.schema import result_schema
from tests.unit.report.runs import KEPT, error_row, result_row, write_run

CONFIG = str(Path(__file__).parents[2] / "configs" / "evaluate.yaml")


def _rows(wrong: int = 0) -> list[dict[str, Any]]:
    rows = [result_row(number, text="right", reference="right") for number in range(30)]
    for number in range(wrong):
        rows[number]["text"] = "wrong"
    return rows


def _evaluate(*words: str) -> int:
    return main(["--config", CONFIG, "--evaluate.thumbnails", "false", *words])


def test_a_finished_run_is_scored_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", [*_rows(wrong=3), error_row(30, "FetchTimeout", "fetch", "late")])
    assert _evaluate("--run.path", str(folder)) == 0
    metrics = json.loads((folder / "__run" / "metrics.json").read_text())
    assert metrics["overall"]["exact_match"]["value"] == pytest.approx(27 / 31), "the row that failed counts as wrong"
    assert {entry["value"] for entry in metrics["slices"]["task"]} == {"colour", "count", "caption", "video"}
    scores = pq.read_table(folder / "__run" / "scores.parquet")
    assert scores.num_rows == 31 and scores.column("score").to_pylist()[:4] == [0, 0, 0, 1]
    page = (folder / "_report.html").read_text()
    assert "87.1 %" in page and "Exact match" in page
    out = capsys.readouterr().out
    assert "87.1 %" in out and re.search(r"all rows +Failed, counted as 0 +1\n", out)


def test_a_partitioned_run_is_scored_and_reported_like_any_other(tmp_path: Path) -> None:
    rows, schema, numbering = _rows(wrong=3), result_schema(KEPT), RowNumbering([30])
    folder = RunFolder(str(tmp_path / "run"))
    folder.prepare()
    writer = FragmentWriter(folder, numbering, schema, 30, 60.0)
    writer.add(pa.Table.from_pylist(rows, schema=schema))
    finalise(folder, numbering, schema, rows_per_part=11, partition_by="task")
    folder.write_run({"state": "finished"})
    assert _evaluate("--run.path", folder.path) == 0
    whole = write_run(tmp_path / "whole", rows)
    assert _evaluate("--run.path", str(whole)) == 0
    both = [json.loads((tmp_path / name / "__run" / "metrics.json").read_text()) for name in ("run", "whole")]
    tasks = [
        {entry["value"]: entry["metrics"]["exact_match"]["value"] for entry in one["slices"]["task"]} for one in both
    ]
    assert tasks[0] == tasks[1] and set(tasks[0]) == {"colour", "count", "caption", "video"}
    page = (tmp_path / "run" / "_report.html").read_text()
    assert "90.0 %" in page and 'id="gallery-worst"' in page


def test_a_run_is_scored_without_naming_what_only_a_new_run_reads(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", _rows(wrong=3))
    assert main(["--run.path", str(folder), "--evaluate.thumbnails", "false"]) == 0
    assert "90.0 %" in (folder / "_report.html").read_text()


def test_a_new_run_needs_all_three_paths(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--evaluate.thumbnails", "false"]) == 2
    said = capsys.readouterr().err
    assert all(f"{section}.path: missing" in said for section in ("input", "model", "output"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "evaluate.references: the manifest has no column 'reference'; found: prompt, answer"),
        (["--evaluate.references", "answr"], "evaluate.references: the manifest has no column 'answr'; found: "),
        (
            ["--evaluate.references", "answer", "--evaluate.cluster", "film", "--evaluate.slices", "[answer, kind]"],
            "evaluate.cluster: the manifest has no column 'film'; evaluate.slices: the manifest has no column 'kind'; ",
        ),
        (
            ["--evaluate.references", "answer", "--input.keep", "source"],
            "input.keep: the manifest has no column 'source'; found: ",
        ),
    ],
)
def test_a_missing_column_is_named_with_the_setting_that_asks_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    (tmp_path / "questions.csv").write_text("prompt,answer\nWhat?,this\n")
    paths = ["--input.path", str(tmp_path / "questions.csv"), "--output.path", str(tmp_path / "out")]
    assert main(["--model.path", "demo", *paths, *words]) == 2
    assert f"error: {expected}" in capsys.readouterr().err


def test_a_folder_of_media_has_no_references_and_is_refused_before_anything_is_generated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    paths = ["--input.path", str(tmp_path), "--output.path", str(tmp_path.parent / "out"), "--input.keep", "source"]
    assert main(["--model.path", "demo", *paths]) == 2
    assert "error: evaluate.references: the manifest has no column 'reference'; " in capsys.readouterr().err


def test_scoring_again_changes_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", _rows(wrong=3))
    _evaluate("--run.path", str(folder))
    before = [(folder / "__run" / name).read_bytes() for name in ("metrics.json", "scores.parquet")]
    _evaluate("--run.path", str(folder))
    assert [(folder / "__run" / name).read_bytes() for name in ("metrics.json", "scores.parquet")] == before


def test_a_run_is_compared_with_its_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline, worse = write_run(tmp_path / "a", _rows()), write_run(tmp_path / "b", _rows(wrong=12))
    assert _evaluate("--run.path", str(worse), "--evaluate.baseline", str(baseline)) == 2
    assert "score it first" in capsys.readouterr().err
    assert _evaluate("--run.path", str(baseline)) == 0
    assert _evaluate("--run.path", str(worse), "--evaluate.baseline", str(baseline)) == 0
    found = json.loads((worse / "__run" / "metrics.json").read_text())["baseline"]["metrics"]["exact_match"]
    assert found["verdict"] == "worse" and found["p_permutation"] < 0.01 and found["difference"] == pytest.approx(-0.4)
    out = capsys.readouterr().out
    assert "on the 30 rows of both: -40.0 points" in out and "12 lost: worse" in out
    assert "Worse than the baseline" in (worse / "_report.html").read_text()


def test_a_run_without_references_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", _rows(), kept=pa.schema([("prompt", pa.string()), ("task", pa.string())]))
    assert _evaluate("--run.path", str(folder)) == 2
    said = capsys.readouterr().err
    assert "has no column reference (evaluate.references); its columns: " in said
    assert "; correct the setting, or run again with it in input.keep" in said


def test_unknown_metrics_are_found_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption, "run", lambda config: pytest.fail("nothing may run"))
    assert _evaluate("--evaluate.metrics", "exactmatch", "--output.path", str(tmp_path / "out")) == 2
    assert "unknown metric exactmatch" in capsys.readouterr().err


class _Caption:
    """Stands for the caption job: answers every row it is asked for, and remembers what it was asked."""

    def __init__(self, alone: str) -> None:
        self.configs: list[CaptionConfig] = []
        self.alone = alone

    def run(self, config: CaptionConfig) -> int:
        self.configs.append(config)
        rows = _rows()[: config.input.limit or 30]
        if config.engine.max_running == 1:
            rows[2]["text"] = self.alone
        write_run(Path(config.output.path), rows)
        return 0


@pytest.mark.parametrize("alone", ["right", "another"])
def test_canary_rows_run_alone_and_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alone: str
) -> None:
    job = _Caption(alone)
    monkeypatch.setattr(caption, "run", job.run)
    assert _evaluate("--evaluate.canaries", "5", "--output.path", str(tmp_path / "out")) == 0
    mixed, single = job.configs
    assert mixed.engine.max_running != 1 and single.engine.max_running == 1 and single.input.limit == 5
    assert {"reference", "task", "prompt"} <= set(mixed.input.keep)
    found = json.loads((tmp_path / "out" / "__run" / "metrics.json").read_text())["canaries"]
    assert found["num_rows"] == 5 and found["num_same"] == (5 if alone == "right" else 4)
    assert [one["id"] for one in found["differing"]] == ([] if alone == "right" else ["row-0002"])
    said = f"{found['num_same']} of 5 rows gave the same answer alone"
    assert found["sentence"].endswith("No difference was found in these rows.") == (alone == "right")
    out = capsys.readouterr().out
    assert said in out and "canaries: the first 5 rows again, each alone" in out
    assert said in (tmp_path / "out" / "_report.html").read_text()


def test_another_number_of_canary_rows_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _Caption("right")
    monkeypatch.setattr(caption, "run", job.run)
    for number in ("5", "3"):
        assert _evaluate("--evaluate.canaries", number, "--output.path", str(tmp_path / "out")) == 0
    folders = [config.output.path for config in job.configs if config.engine.max_running == 1]
    assert len(set(folders)) == 2 and all(one.startswith(str(tmp_path / "out" / "__run")) for one in folders)


@pytest.mark.parametrize("drawn", [{"sampling.temperature": "1"}, {"input.settings": "[temperature]"}])
def test_canaries_of_answers_that_are_drawn_need_a_seed(drawn: dict[str, str]) -> None:
    wanted = {"evaluate.canaries": "3", **drawn}
    with pytest.raises(ConfigError, match=r"^\S+: evaluate\.canaries compares .*set sampling\.seed"):
        load_config(EvaluateConfig, CONFIG, wanted)
    for change in ({"sampling.seed": "1"}, {"evaluate.canaries": "0"}, {"run.path": "out/finished"}):
        load_config(EvaluateConfig, CONFIG, wanted | change)


def test_canaries_compare_token_counts_and_finish_reasons_too(tmp_path: Path) -> None:
    mixed, alone = _rows(), _rows()[:4]
    alone[1]["num_output_tokens"] += 1
    alone[2]["finish_reason"] = "length"
    readers = [RunReader(str(write_run(tmp_path / name, rows))) for name, rows in (("mixed", mixed), ("alone", alone))]
    assert compare_canaries(*readers)["num_same"] == 2


def test_the_config_extends_the_caption_config() -> None:
    config = load_config(EvaluateConfig, CONFIG, {"run.path": "out/x", "evaluate.tasks": "{a: [anls]}"})
    assert isinstance(config, CaptionConfig)
    assert config.run.path == "out/x" and config.evaluate.tasks == {"a": ["anls"]}


@pytest.mark.slow
def test_the_demo_checkpoint_is_evaluated_end_to_end(tmp_path: Path) -> None:
    from pipeline.demo.manifest import write_demo_world

    world, out = tmp_path / "world", tmp_path / "out"
    write_demo_world(world, rows_per_task=2, seed=1)
    assert _evaluate("--input.path", str(world), "--output.path", str(out), "--evaluate.canaries", "3") == 0
    metrics = json.loads((out / "__run" / "metrics.json").read_text())
    assert metrics["overall"]["exact_match"]["value"] > 0.8
    assert metrics["canaries"]["num_same"] == 3
