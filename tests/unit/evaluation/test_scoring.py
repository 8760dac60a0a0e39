"""Result rows in, scores out: which metric a row gets, what errors count, slices, corpus scores, two runs compared."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sacrebleu
from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.evaluation.comparison import compare_runs
from pipeline.evaluation.metrics import registry
from pipeline.evaluation.metrics.cider import Cider
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.settings import ScoringSettings
from pipeline.evaluation.slices import OTHER
from pipeline.report.scores import read_scores
from pipeline.schema import result_schema


def _batch(texts: Sequence[str | None], kept: dict[str, pa.Array], media: list[Any] | None = None) -> pa.RecordBatch:
    """Result rows with these answers (None: an error row) and kept columns."""
    size = len(texts)
    schema = result_schema(pa.schema([(name, column.type) for name, column in kept.items()]))
    columns: dict[str, Any] = {
        name: pa.nulls(size, field.type) for name, field in zip(schema.names, schema, strict=True)
    }
    columns |= {
        "id": pa.array([f"row-{row}" for row in range(size)]),
        "text": pa.array(texts, pa.string()),
        "status": pa.array(["error" if text is None else "ok" for text in texts]),
        "attempts": pa.array([1] * size, pa.int32()),
        "media": pa.array(media or [[]] * size, schema.field("media").type),
        "manifest_file": pa.array([0] * size, pa.int32()),
        "manifest_row": pa.array(range(size), pa.int64()),
        **kept,
    }
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def _medium(kind: str, width: int, height: int) -> dict[str, Any]:
    return {"kind": kind, "source": "x", "source_width": width, "source_height": height}


def _scores(scorer: Scorer, *batches: pa.RecordBatch) -> pa.Table:
    scorer.learn(batches)
    return pa.Table.from_batches([scorer.score(batch) for batch in batches])


def test_each_row_is_scored_by_its_tasks_metrics_or_by_the_default_ones() -> None:
    kept = {
        "answer": pa.array(["red", "100", "cat", "B"]),
        "kind": pa.array(["colour", "number", None, "choice"]),
        "options": pa.array([None, None, None, ["cat", "dog"]], pa.list_(pa.string())),
    }
    settings = ScoringSettings(
        references="answer",
        metrics=("exact_match",),
        tasks={"number": ("relaxed_accuracy", "exact_match"), "choice": ("multiple_choice",)},
        task_column="kind",
        choices="options",
    )
    scorer = Scorer(settings)
    rows = _scores(scorer, _batch(["red", "104", "dog", "It is the dog"], kept)).to_pylist()
    assert [row["metric"] for row in rows] == ["exact_match", "relaxed_accuracy", "exact_match", "multiple_choice"]
    assert [row["score"] for row in rows] == [1, 1, 0, 1]
    assert rows[1]["exact_match"] == 0 and rows[0]["relaxed_accuracy"] is None
    metrics = scorer.metrics()
    assert metrics["overall"]["exact_match"]["value"] == pytest.approx(1 / 3)
    by_task = {one["value"]: one["metrics"] for one in metrics["slices"]["task"]}
    assert by_task["number"]["relaxed_accuracy"]["value"] == 1
    assert by_task["(none)"]["exact_match"]["num_rows"] == 1


def test_the_metric_column_overrides_the_config() -> None:
    batch = _batch(
        ["Red!", "Red!", "Red!"],
        {"answer": pa.array(["red"] * 3), "metric": pa.array(["normalised_match", "exact_match, token_f1", None])},
    )
    settings = ScoringSettings(references="answer", metrics=("exact_match",), metric_column="metric")
    rows = _scores(Scorer(settings), batch).to_pylist()
    assert [row["score"] for row in rows] == [1, 0, 0]
    assert rows[1]["token_f1"] == 1


def test_a_failed_row_scores_zero_and_a_row_without_reference_is_not_scored() -> None:
    batch = _batch(["y", None, "x", None], {"answer": pa.array(["y", "y", None, ""])})
    scorer = Scorer(ScoringSettings(references="answer", metrics=("exact_match",)))
    assert _scores(scorer, batch).column("score").to_pylist() == [1, 0, None, None]
    metrics = scorer.metrics()
    assert (metrics["num_rows"], metrics["num_errors"], metrics["num_without_reference"]) == (4, 2, 2)
    assert metrics["overall"]["exact_match"]["value"] == 0.5


def test_references_may_be_structs_lists_numbers_or_texts() -> None:
    answers = pa.array([[{"answer": "red", "answer_id": n} for n in range(10)], None])
    texts = ["red", "red"]
    settings = ScoringSettings(references="answers", metrics=("vqa_accuracy",))
    assert _scores(Scorer(settings), _batch(texts, {"answers": answers})).column("score").to_pylist() == [1, None]
    halves = _batch(texts * 2, {"answers": pa.chunked_array([answers, answers]).combine_chunks()}).slice(2)
    assert _scores(Scorer(settings), halves).column("score").to_pylist() == [1, None], "slices of batches too"
    numbers = ScoringSettings(references="n", metrics=("exact_match",))
    assert _scores(Scorer(numbers), _batch(["3", "4"], {"n": pa.array([3, 5])})).column("score").to_pylist() == [1, 0]


def test_the_parse_rate_counts_answers_that_name_no_option() -> None:
    kept = {"answer": pa.array(["B"] * 4), "options": pa.array(['["cat", "dog"]'] * 4)}
    scorer = Scorer(ScoringSettings(references="answer", metrics=("multiple_choice",), choices="options"))
    rows = _scores(scorer, _batch(["B", "a dog", "no idea", None], kept))
    assert rows.column("score").to_pylist() == [1, 1, 0, 0], "options may be JSON text"
    metrics = scorer.metrics()
    assert metrics["multiple_choice"] == {"num_answers": 3, "num_parsed": 2}
    failed, parsed = read_scores(metrics).notes
    assert (failed.title, failed.num_rows) == ("Failed, counted as 0", 1)
    assert (parsed.title, parsed.num_rows, parsed.share) == ("Parse rate", 2, pytest.approx(2 / 3))


def test_mmmu_is_one_mean_over_both_kinds_of_question() -> None:
    kept = {"answer": pa.array(["B", "12.5", "A"]), "options": pa.array(['["cat", "dog"]', "[]", '["cat", "dog"]'])}
    scorer = Scorer(ScoringSettings(references="answer", metrics=("mmmu",), choices="options"))
    assert _scores(scorer, _batch(["dog", "It is 12.5", "no idea"], kept)).column("score").to_pylist() == [1, 1, 0]
    metrics = scorer.metrics()
    assert metrics["overall"]["mmmu"]["value"] == pytest.approx(2 / 3)
    assert metrics["multiple_choice"] == {"num_answers": 2, "num_parsed": 1}, "an open answer names no option"


def test_corpus_scores_do_not_depend_on_the_batches() -> None:
    texts = ["a red cat sits on the mat", "two dogs run over a green lawn", "a bird", None]
    references = [["a red cat is on the mat"], ["two dogs run on a lawn", "dogs on grass"], ["a blue bird"], ["a fish"]]
    kept = {"captions": pa.array(references)}
    settings = ScoringSettings(references="captions", metrics=("bleu", "cider"))
    batch = _batch(texts, kept)
    whole, halves = Scorer(settings), Scorer(settings)
    rows = _scores(whole, batch)
    _scores(halves, batch.slice(0, 1), batch.slice(1))
    streams = [[row[0] for row in references], [row[-1] for row in references]]
    expected = sacrebleu.corpus_bleu([text or "" for text in texts], streams).score / 100
    assert whole.metrics()["overall"]["bleu"]["value"] == pytest.approx(expected)
    assert whole.metrics() == halves.metrics()
    what = whole.metrics()["definitions"]["cider"]["what"]
    assert "The interval is about other rows, with these rows' weights" in what, "of n-grams, which other rows change"
    cider = Cider()
    for row in references:
        cider.add_references(row)
    expected_rows = [cider.score(text, row) for text, row in zip(texts, references, strict=True) if text]
    assert rows.column("cider").to_pylist() == pytest.approx([*expected_rows, 0])


def test_slices_by_columns_and_by_the_receipts_of_media() -> None:
    media = [
        [],
        [_medium("image", 640, 480)],
        [_medium("image", 100, 100), _medium("image", 3000, 2000)],
        [_medium("video", 320, 240)],
        [_medium("video", 320, 240), _medium("image", 64, 64)],
    ]
    batch = _batch(
        ["1", "1", "0", "0", "1"], {"answer": pa.array([1] * 5), "source": pa.array(["a", "b", "b", "b", "b"])}, media
    )
    slices = ("source", "media_kind", "resolution_bucket", "num_media")
    scorer = Scorer(ScoringSettings(references="answer", metrics=("exact_match",), slices=slices))
    _scores(scorer, batch)
    found = {
        name: {one["value"]: one["metrics"]["exact_match"]["value"] for one in values}
        for name, values in scorer.metrics()["slices"].items()
    }
    assert found["source"] == {"a": 1, "b": 0.5}
    assert found["media_kind"] == {
        "text only": 1, "one image": 1, "several images": 0, "one video": 0, "images and videos": 1,
    }  # fmt: skip
    assert found["resolution_bucket"] == {"no media": 1, "below 0.25 MP": 0.5, "0.25 to 1 MP": 1, "4 MP and more": 0}
    assert list(found["num_media"]) == ["0", "1", "2"]


def test_a_slice_shows_a_bounded_number_of_values() -> None:
    values = [f"v{row:04d}" for row in range(500)]
    batch = _batch(["1"] * 500, {"answer": pa.array([1] * 500), "user": pa.array(values)})
    scorer = Scorer(ScoringSettings(references="answer", metrics=("exact_match",), slices=("user",)))
    _scores(scorer, batch)
    found = {one["value"]: one["num_rows"] for one in scorer.metrics()["slices"]["user"]}
    assert len(found) == 51
    assert found[OTHER] == 450
    assert sum(found.values()) == 500


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"metrics": ("exact", "bleu")}, "exact"),
        ({"tasks": {"a": ("no_such",)}}, "no_such"),
        ({"metrics": ()}, "evaluate.metrics"),
    ],
)
def test_unknown_or_missing_metrics_are_refused_by_name(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        ScoringSettings(references="answer", **settings)


def test_an_unknown_metric_in_the_metric_column_is_refused_by_name() -> None:
    scorer = Scorer(ScoringSettings(references="answer", metric_column="metric"))
    with pytest.raises(ConfigError, match=r"evaluate\.metric_column: unknown metric exactmatch"):
        scorer.score(_batch(["x"], {"answer": pa.array(["x"]), "metric": pa.array(["exactmatch"])}))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (pa.array([["exact_match", None]]), r"\['exact_match', None\]"),
        (pa.array([0]), "0"),
        (pa.array([b"exact_match"]), "11 bytes"),
        (pa.array([{"name": "exact_match"}]), r"\{'name': 'exact_match'\}"),
    ],
)
def test_a_metric_column_without_names_is_refused_with_what_it_holds(values: pa.Array, found: str) -> None:
    scorer = Scorer(ScoringSettings(references="answer", metric_column="metric"))
    with pytest.raises(ConfigError, match=rf"evaluate\.metric_column: a row holds {found}; expected names of metrics"):
        scorer.score(_batch(["x"], {"answer": pa.array(["x"]), "metric": values}))


@pytest.mark.parametrize("value", [None, float("nan"), "", []])
def test_a_row_whose_metric_column_is_empty_has_the_config_s_metrics(value: Any) -> None:
    scorer = Scorer(ScoringSettings(references="answer", metrics=("exact_match",), metric_column="metric"))
    batch = _batch(["x"], {"answer": pa.array(["x"]), "metric": pa.array([value])})
    assert _scores(scorer, batch).column("score").to_pylist() == [1]


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge_l", "anls"])
def test_a_missing_package_is_an_error_that_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda package: None)
    registry.require.cache_clear()
    Scorer(ScoringSettings(metrics=["exact_match", "cider"]))
    with pytest.raises(ConfigError, match=rf"{name} needs .*pip install 'qwen2-vl-batch\[eval\]'"):
        Scorer(ScoringSettings(metrics=[name]))
    rows = Scorer(ScoringSettings(references="answer", metric_column="metric"))
    with pytest.raises(ConfigError, match="pip install"):
        rows.score(_batch(["x"], {"answer": pa.array(["x"]), "metric": pa.array([name])}))
    with pytest.raises(ConfigError, match="the comparison with a baseline needs the package scipy"):
        compare_runs([], [])


def test_importing_the_scorer_loads_no_package_of_the_extra() -> None:
    code = "import sys, pipeline.evaluation.run_folder; print({'sacrebleu', 'rouge_score', 'scipy'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "set()"


def _run(texts: Sequence[str | None], tasks: list[str], ids: Sequence[str | None] | None = None) -> pa.RecordBatch:
    batch = _batch(texts, {"answer": pa.array(["1"] * len(texts)), "task": pa.array(tasks)})
    if ids:
        batch = batch.set_column(0, "id", pa.array(ids))
    scorer = Scorer(ScoringSettings(references="answer", metrics=("exact_match",), task_column="task"))
    return scorer.score(batch)


def test_two_runs_are_paired_by_row_key_in_any_order() -> None:
    tasks = ["easy"] * 40 + ["hard"] * 40
    baseline = _run(["1"] * 80, tasks)
    candidate = _run(["1"] * 40 + ["0"] * 30 + ["1"] * 10, tasks)
    shuffled = candidate.take(pa.array(np.random.default_rng(0).permutation(80)[:79]))
    result = compare_runs([shuffled], [baseline.slice(0, 50), baseline.slice(50)])
    comparison = result["metrics"]["exact_match"]
    assert comparison["verdict"] == "worse" and comparison["p_permutation"] < 0.01
    assert comparison["lost"] in (29, 30) and comparison["won"] == 0
    assert result["tasks"]["easy"]["verdict"] == "identical"
    assert result["tasks"]["hard"]["verdict"] == "worse"
    assert (result["only_candidate"], result["only_baseline"]) == (0, 1)
    assert result["won"] == [] and len(result["lost"]) == 8 and all(40 <= row < 70 for _, row in result["lost"])


def test_runs_over_different_manifests_are_paired_by_id() -> None:
    baseline = _run(["1", "1", "0"], ["t"] * 3, ["a", "b", "c"])
    candidate = _run(["0", "1"], ["t"] * 2, ["c", "a"])
    result = compare_runs([candidate], [baseline], by_id=True)
    assert result["metrics"]["exact_match"]["num_rows"] == 2
    assert result["metrics"]["exact_match"]["verdict"] == "identical"


def test_rows_whose_id_is_null_or_not_unique_are_counted_and_never_paired() -> None:
    baseline = _run(["1"] * 6, ["t"] * 6, ["a", "b", "b", None, None, "c"])
    candidate = _run(["0"] * 4, ["t"] * 4, ["a", "b", None, "c"])
    overlapping = [candidate, candidate.slice(0, 1)]  # fragments of an unfinished run
    result = compare_runs(overlapping, [baseline], by_id=True)
    assert result["metrics"]["exact_match"]["num_rows"] == 2
    assert (result["ambiguous_candidate"], result["ambiguous_baseline"]) == (1, 4)
    assert (result["only_candidate"], result["only_baseline"]) == (1, 0), "b, which the baseline has twice"


def test_comparing_with_an_empty_run_finds_no_rows() -> None:
    result = compare_runs([], [_run(["1"], ["t"])])
    assert result["metrics"] == {} and result["only_baseline"] == 1
