"""Two run folders compared: the rows that both have, CIDEr's document frequencies, corpus scores, clusters."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sacrebleu

from pipeline.errors import OutputError
from pipeline.evaluation.comparison import compare_folders
from pipeline.evaluation.metrics.cider import Cider
from pipeline.report.scores import read_differences
from tests.unit.report.runs import KEPT, RUN, error_row, result_row, write_run, write_scores

_WORDS = ["a", "the", "red", "blue", "cat", "dog", "sits", "runs", "on", "mat", "grass", "with", "man", "in", "house"]


def _captions(num_rows: int) -> list[dict[str, Any]]:
    rng = random.Random(1)
    texts = [" ".join(rng.choices(_WORDS, k=8)) for _ in range(2 * num_rows)]
    return [result_row(row, text=texts[row], reference=texts[num_rows + row]) for row in range(num_rows)]


def _scored(folder: Path, rows: list[dict[str, Any]], run: dict[str, Any] = RUN, **settings: Any) -> str:
    chosen: dict[str, Any] = {"metrics": ("cider", "coco_rouge_l"), "task_column": None}
    write_scores(write_run(folder, rows, run=run), **(chosen | settings))
    return str(folder)


def test_the_same_answers_score_the_same_where_one_run_has_other_rows_too(tmp_path: Path) -> None:
    rows = _captions(40)
    whole, part = _scored(tmp_path / "whole", rows), _scored(tmp_path / "part", rows[:39])
    found = compare_folders(whole, part)
    assert found is not None
    cider = found["metrics"]["cider"]
    assert cider["verdict"] == "identical" and cider["num_rows"] == 39 and found["only_candidate"] == 1
    frequencies = Cider()
    for row in rows[:39]:
        frequencies.add_references([row["reference"]])
    expected = np.mean([frequencies.score(row["text"], [row["reference"]]) for row in rows[:39]])
    assert cider["value"] == cider["baseline"] == pytest.approx(expected)
    assert found["won"] == found["lost"] == []


def test_runs_of_different_manifests_share_document_frequencies_too(tmp_path: Path) -> None:
    rows = _captions(30)
    moved = [{**row, "manifest_row": row["manifest_row"] + 7} for row in rows[10:]]
    other = {**RUN, "manifest": {"path": "other", "fingerprint": {"num_rows": 27, "files": []}}}
    moved[3]["text"] = moved[3]["reference"]
    candidate, baseline = _scored(tmp_path / "a", moved, other), _scored(tmp_path / "b", rows)
    found = compare_folders(candidate, baseline)
    assert found is not None and found["paired_by"] == "id"
    assert (found["metrics"]["cider"]["won"], found["metrics"]["cider"]["tied"]) == (1, 19)
    assert found["won"] == [[0, 20]] and found["won_baseline"] == [[0, 13]], "the same row in either run"


def test_runs_are_paired_by_place_where_digests_or_ids_show_that_their_rows_are_the_same(tmp_path: Path) -> None:
    def run(digest: str | None) -> dict[str, Any]:
        files = [["m.jsonl", 9, 8, digest] if digest else ["m.jsonl", 9, 8]]
        return {**RUN, "manifest": {"path": "m.jsonl", "fingerprint": {"num_rows": 8, "files": files}}}

    rows = _captions(8)
    rows[2]["id"] = None
    shuffled = [{**row, "manifest_row": number} for number, row in enumerate(rows[::-1])]
    renamed = [{**row, "id": f"other {row['id']}"} for row in rows]
    cases = [
        (shuffled, "one", "other", "id"),
        (shuffled, None, "one", "id"),
        (shuffled, None, None, "id"),
        (rows, None, "one", "place"),
        (rows, None, None, "place"),
        (rows, "one", "other", "id"),
        (renamed, "one", "one", "place"),
    ]
    for number, (theirs, digest, other_digest, paired_by) in enumerate(cases):
        folders = [tmp_path / f"{number}{name}" for name in "ab"]
        for folder, rows_of_it, recorded in zip(folders, (rows, theirs), (digest, other_digest), strict=True):
            _scored(folder, rows_of_it, run(recorded), metrics=("exact_match",))
        found = compare_folders(*map(str, folders))
        assert found is not None and found["paired_by"] == paired_by, number
        assert found["metrics"]["exact_match"]["verdict"] == "identical"


def test_failed_rows_count_nothing_under_shared_document_frequencies(tmp_path: Path) -> None:
    rows = _captions(12)
    failed = [*rows[:11], {**error_row(11, "FetchTimeout", "fetch", "late"), "reference": rows[11]["reference"]}]
    perfect = [{**row, "text": row["reference"]} for row in rows[1:]]
    found = compare_folders(_scored(tmp_path / "a", failed), _scored(tmp_path / "b", perfect))
    assert found is not None
    assert found["metrics"]["cider"]["num_rows"] == 11 and found["metrics"]["cider"]["baseline"] == pytest.approx(10)
    assert [0, 11] in found["lost"]


def test_corpus_scores_are_compared_as_corpus_scores_in_all_rows_and_by_task(tmp_path: Path) -> None:
    rows = _captions(40)
    better = [{**row, "text": row["reference"] if number % 2 else row["text"]} for number, row in enumerate(rows)]
    folders = [
        _scored(tmp_path / name, one, metrics=("bleu",), task_column="task")
        for name, one in (("a", better), ("b", rows))
    ]
    found = compare_folders(*folders, num_samples=200)
    assert found is not None
    bleu = found["metrics"]["bleu"]
    for key, one in (("value", better), ("baseline", rows)):
        corpus = sacrebleu.corpus_bleu([row["text"] for row in one], [[row["reference"] for row in one]])
        assert 100 * bleu[key] == pytest.approx(corpus.score)
    assert bleu["verdict"] == "better" and 0 < bleu["low"] < bleu["difference"] < bleu["high"]
    task = found["tasks"]["count"]
    texts = [row for row in better if row["task"] == "count"]
    corpus = sacrebleu.corpus_bleu([row["text"] for row in texts], [[row["reference"] for row in texts]])
    assert 100 * task["value"] == pytest.approx(corpus.score) and task["metric"] == "bleu"


def test_rows_of_a_cluster_are_compared_as_one(tmp_path: Path) -> None:
    kept = pa.schema([*KEPT, ("video", pa.string())])

    def scored(name: str, cluster: str | None, right: bool) -> str:
        rows = [
            result_row(row, text="right" if right or row >= 24 else "wrong", reference="right")
            | {"video": f"v{row // 8}"}
            for row in range(40)
        ]
        folder = write_run(tmp_path / f"{name}{cluster}", rows, kept=kept)
        write_scores(folder, metrics=("exact_match",), cluster=cluster)
        return str(folder)

    found = {
        cluster: compare_folders(scored("a", cluster, True), scored("b", cluster, False)) for cluster in (None, "video")
    }
    by_row, by_video = (one["metrics"]["exact_match"] for one in found.values() if one)
    assert by_row["verdict"] == "better" and by_row["p_permutation"] < 1e-4
    assert by_video["verdict"] == "no difference found" and by_video["p_sign"] == 0.25, "three of five videos differ"
    assert by_video["high"] - by_video["low"] > 2 * (by_row["high"] - by_row["low"])
    assert by_video["won"] == 24


def test_scores_of_another_version_are_refused(tmp_path: Path) -> None:
    one, other = (_scored(tmp_path / name, _captions(4)) for name in "ab")
    path = Path(other) / "__run" / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 1}))
    with pytest.raises(OutputError, match="score it again"):
        compare_folders(one, other)


def test_a_task_with_several_first_metrics_has_a_line_for_each(tmp_path: Path) -> None:
    kept = pa.schema([*KEPT, ("metric_of_row", pa.string())])
    rows = [
        result_row(row, task="mixed") | {"metric_of_row": "exact_match" if row % 2 else "bleu"} for row in range(12)
    ]
    folders = []
    for name in "ab":
        folder = write_run(tmp_path / name, rows, kept=kept)
        write_scores(folder, metric_column="metric_of_row")
        folders.append(str(folder))
    found = compare_folders(*folders)
    assert found is not None and set(found["tasks"]) == {"mixed: exact_match", "mixed: bleu"}
    definitions = {"definitions": {"bleu": {"title": "BLEU (sacrebleu)"}}}
    titles = {one.title for one in read_differences(definitions, found).values()}
    assert {"task mixed: exact_match", "task mixed: BLEU (sacrebleu)"} < titles
