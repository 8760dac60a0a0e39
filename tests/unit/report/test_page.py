"""The page: self-contained, escaped, complete, and without claims about what the run did not record."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jobs.evaluate import print_scores
from jobs.report import main as write_page
from pipeline.errors import OutputError
from pipeline.evaluation.comparison import compare_folders
from pipeline.planning.roofline import SHAPES
from pipeline.report import Report, ReportOptions, gather, render, render_html, render_markdown
from pipeline.results.reader import RunReader
from tests.unit.report.runs import HOSTILE, RUN, error_row, result_row, write_run, write_scores

_QUICK = ReportOptions(thumbnails=False)


class _Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file_that_loads_nothing(page: str) -> None:
    tags = _Tags(page).tags
    assert not [tag for tag, _ in tags if tag in ("script", "iframe", "object", "embed", "form", "base", "video")]
    links = [value for _, attrs in tags for name, value in attrs.items() if name in ("src", "href", "srcset", "data")]
    assert links and all(str(link).startswith(("data:image/jpeg;base64,", "data:,", "#")) for link in links)
    policy = [attrs["content"] for tag, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy and "default-src 'none'" in str(policy[0])
    assert "url(" not in page and "@import" not in page
    assert len(page.encode()) < 5_000_000


def test_hostile_strings_stay_text(page: str) -> None:
    parsed = _Tags(page)
    for tag, attrs in parsed.tags:
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
    assert [tag for tag, _ in parsed.tags].count("style") == 1
    for text in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[3], HOSTILE[4], HOSTILE[5]):
        assert text in parsed.text
    assert not set(page) & {"\u202e", "\u0000", "\u001b"}, "nothing that reverses or controls the terminal"


def test_secrets_in_settings_and_urls_are_not_on_the_page(page: str) -> None:
    assert "AKIA-REAL" not in page
    assert "input.storage_options.key" in page, "the setting is named, its value is not"
    assert "http://minio" in page
    assert "user:pw" not in page


def test_scores_have_their_intervals_overall_and_by_slice(page: str, report: Report) -> None:
    text = " ".join(_Tags(page).text.split())
    overall = report.scores.overall["exact_match"].estimate
    assert f"{100 * overall.value:.1f} %" in text
    assert f"{100 * overall.low:.1f} to {100 * overall.high:.1f} %" in text
    for name in ("task", "source", "media_kind", "resolution_bucket", "several images", "one video"):
        assert name in text


def test_model_engine_data_code_and_hardware_are_shown(page: str) -> None:
    text = " ".join(_Tags(page).text.split())
    for fact in (
        "Qwen/Qwen2-VL-2B-Instruct, revision 895c3a4", "greedy, at most 64 tokens", "commit 0123456789ab with changes",
        "2 x NVIDIA H200", "flash attention, eager kernels, CUDA graphs",
        "kernels fused: RuntimeError: no C compiler", "60 rows in 1 file", "torch 2.13.0",
    ):  # fmt: skip
        assert fact in text


def test_speed_cost_and_utilisation_are_computed_from_the_run(report: Report, page: str) -> None:
    speed = report.speed
    assert speed.gpu_hours == pytest.approx(2 * 0.5)
    assert speed.cost == pytest.approx(2.5)
    shape = SHAPES["2b"]  # 1.54 and 0.67 billion weights; the tower sees four patches for each visual token
    flops = 2 * (shape.body + shape.head) * 92e6 + 2 * (4 * shape.vision_body + shape.merger) * 70e6
    assert speed.mfu == pytest.approx(flops / (989e12 * 2 * 1800))
    stages = {stage.name: (stage.num_actors, stage.busy_share) for stage in speed.stages}
    assert {name: workers for name, (workers, _) in stages.items()} == {"preprocess": 2, "engine": 2}
    assert stages["engine"][1] == pytest.approx(2650 / 3600)
    assert stages["preprocess"][1] == pytest.approx(2900 / 3600)
    assert speed.bottleneck == RUN["bottleneck"]
    assert "€2.50" in page
    assert page.count('class="line"') >= 2, "rows/s and tokens/s over time"


def test_figures_of_a_resumed_run_are_of_all_its_runs_or_say_of_which(tmp_path: Path) -> None:
    rows = [result_row(number) for number in range(60)]
    totals = {
        "runs": 3, "rows": 66, "seconds": 7200.0, "row_seconds": 6600.0, "gpu_seconds": 14400.0,
        "output_tokens": 3_000_000, "prompt_tokens": 1, "visual_tokens": 0,
    }  # fmt: skip
    whole = {**RUN, "num_runs": 3, "totals": totals, "counts": {"rows": 60, "done": 60, "this_run": 6}}
    whole["throughput"] = {**RUN["throughput"], "rows_per_s": 0.5, "seconds": 12.0}
    options = ReportOptions(thumbnails=False, price_per_gpu_hour=2.0)

    def shown(run: dict[str, Any]) -> tuple[str, str]:
        report = gather(str(write_run(tmp_path / "run", rows, run=run)), options=options)
        return " ".join(_Tags(render_html(report)).text.split()), render_markdown(report)

    page, markdown = shown(whole)
    assert "60 rows, no errors; 2 h 00 min with start-up (3 runs); the last run did 6 rows in 12.0 s." in page
    assert "$8.00 at $2.0 a GPU-hour (3 runs)" in page and "4 (3 runs); 66,666.7 for a million rows" in page
    assert "6 rows in 12.0 s, 0.5 rows/s without start-up" in page and "Stages of the last run" in page
    assert "0.01 rows/s" in page, "66 rows in 6,600 s"
    assert "4 GPU-hours ($8.00), in 3 runs." in markdown
    page, markdown = shown({**whole, "totals": {**totals, "runs": 2}})
    assert "4 (the last 2 of 3 runs); 60,606.1 for a million rows" in page
    page, markdown = shown({**{name: value for name, value in whole.items() if name != "totals"}})
    assert "(the last of 3 runs); 1,111.1 for a million rows" in page, "two GPUs for 12 s, and 6 rows"
    assert "in the last of 3 runs." in markdown


def test_every_section_of_the_gallery_shows_the_rows_it_names(report: Report) -> None:
    sections = {section.key: section.cards for section in report.sections}
    assert set(sections) == {
        "worst", "best", "random", "errors", "truncated", "repeating", "longest", "slowest",
    }  # fmt: skip
    assert [card.id for card in sections["truncated"]] == ["row-0003"]
    assert {card.id for card in sections["repeating"]} == {"row-0003", "row-0005"}
    assert sections["slowest"][0].id == "row-0007"
    assert {card.score for card in sections["best"]} == {1.0}
    assert {card.score for card in sections["worst"]} == {0.0}
    assert all(card.error for card in sections["errors"])
    assert "the file ends after 512 of 2,048 bytes" in str(sections["errors"][0].error)
    assert dict(sections["worst"][0].facts)["prompt tokens"]


def test_errors_are_counted_by_type_with_an_example_each(report: Report) -> None:
    assert (report.errors[0].kind, report.errors[0].num_rows) == ("TruncatedMedia", 2)
    assert all(one.example is not None and one.example.error for one in report.errors)


def test_images_and_videos_have_pictures_with_alternative_text(page: str) -> None:
    tags = _Tags(page).tags
    pictures = [attrs for tag, attrs in tags if tag == "span" and "strip" in str(attrs.get("class"))]
    films = [attrs for attrs in pictures if "film" in str(attrs["class"])]
    assert pictures and films
    assert all(attrs["aria-label"] for attrs in pictures)
    assert "4 frames of it" in str(films[0]["aria-label"])
    assert all("alt" in attrs for tag, attrs in tags if tag == "img")
    assert all(attrs.get("aria-label") for tag, attrs in tags if tag == "svg")
    assert "not on this machine" in page


def test_an_unfinished_run_without_references_gets_a_page_too(tmp_path: Path) -> None:
    rows = [result_row(number, reference=None) for number in range(9)]
    rows[4] = error_row(4, "FetchTimeout", "fetch", "silent")
    run = {**RUN, "state": "running", "manifest": {**RUN["manifest"], "num_rows": 60}}
    folder = write_run(tmp_path / "run", rows, run=run, finished=False)
    report = gather(str(folder), options=_QUICK)
    text = " ".join(_Tags(render_html(report)).text.split())
    assert report.state == "running"
    assert "9 of 60 rows" in text and "The run is not finished" in text
    assert "Exact match" not in text and "Scores by slice" not in text
    assert {section.key for section in report.sections} >= {"random", "errors", "longest"}


def test_a_row_in_several_fragments_counts_once_and_its_answer_wins(tmp_path: Path) -> None:
    again = [result_row(2, text="second try", attempts=2), error_row(3, "FetchTimeout", "fetch", "late")]
    rows = [result_row(0), result_row(1), error_row(2, "FetchTimeout", "fetch", "early"), result_row(3), *again]
    folder = write_run(tmp_path / "run", rows, finished=False)
    found = gather(str(folder), options=_QUICK).rows
    assert (found.num_rows, found.num_ok) == (4, 4)


def test_a_folder_without_run_json_or_rows_has_a_page_and_one_with_neither_is_refused(tmp_path: Path) -> None:
    bare = write_run(tmp_path / "bare", [result_row(0), result_row(1)], run=None)
    assert "holds no run.json" in render_html(gather(str(bare), options=_QUICK))
    empty = tmp_path / "empty"
    (empty / "__run").mkdir(parents=True)
    (empty / "__run" / "run.json").write_text(json.dumps({"state": "running"}))
    assert "0 rows" in render_html(gather(str(empty), options=_QUICK))
    (tmp_path / "stranger").mkdir()
    with pytest.raises(OutputError, match=r"not a run folder.*part-\*"):
        gather(str(tmp_path / "stranger"))


def test_scores_of_other_rows_are_not_shown_as_these_rows(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [result_row(number) for number in range(6)])
    write_scores(folder)
    write_run(folder, [result_row(number + 1) for number in range(6)])
    report = gather(str(folder), options=_QUICK)
    assert not report.rows.scores_fit
    assert all(card.score is None for section in report.sections for card in section.cards)
    assert "score it again" in render_html(report)


def _pair(tmp_path: Path, change: Any) -> tuple[Path, Path]:
    rows = [result_row(number, text="right", reference="right") for number in range(40)]
    folders = tmp_path / "candidate", tmp_path / "baseline"
    write_run(folders[0], [change(row) for row in rows], run={**RUN, "throughput": {"rows_per_s": 10.0}})
    write_run(folders[1], rows)
    for folder in folders:
        write_scores(folder)
    return folders


def test_a_regression_is_reported_with_rows_that_show_it(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "text": "wrong"} if row["manifest_row"] % 3 == 0 else row

    candidate, baseline = _pair(tmp_path, change)
    report = gather(str(candidate), baseline=str(baseline), options=_QUICK)
    text = " ".join(_Tags(render_html(report)).text.split())
    assert "Worse than the baseline: Exact match -35.0 points" in text
    assert "0 rows won, 14 lost, 26 tied" in text
    assert "The same answer, letter for letter: 26 of 40 shared rows." in text
    lost = next(section.cards for section in report.sections if section.key == "lost")
    assert {(card.answer, card.baseline) for card in lost} == {("wrong", "right")}
    assert "won" not in {section.key for section in report.sections}
    assert "**Worse than the baseline" in render_markdown(report)


@pytest.mark.parametrize(("text", "shown"), [("right", {"best"}), ("wrong", {"worst"})])
def test_rows_that_all_score_the_same_are_not_both_best_and_worst(tmp_path: Path, text: str, shown: set[str]) -> None:
    rows = [result_row(number, text=text, reference="right") for number in range(5)]
    folder = write_run(tmp_path / "run", rows)
    write_scores(folder)
    sections = {section.key for section in gather(str(folder), options=_QUICK).sections}
    assert sections & {"best", "worst"} == shown


def test_equal_runs_are_reported_as_identical(tmp_path: Path) -> None:
    candidate, baseline = _pair(tmp_path, lambda row: row)
    text = render_html(gather(str(candidate), baseline=str(baseline), options=_QUICK))
    assert "Identical scores on all 40 rows" in text


def test_two_runs_without_scores_are_compared_by_their_answers(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [result_row(number) for number in range(8)])
    other = write_run(tmp_path / "other", [result_row(number, text=f"answer {number % 2}") for number in range(8)])
    assert compare_folders(str(one), str(other)) is None
    text = render_html(gather(str(one), baseline=str(other), options=_QUICK))
    assert "are the same text as the baseline" in text


def _media_run(folder: Path, path: str, answers: dict[str, str], **throughput: float) -> str:
    """A run over a folder of media: its rows are in the order of its own listing, and their ids are the names."""
    listing = [[f"{folder}/__run/manifest.parquet", 3_309, len(answers)]]
    fingerprint = {"format": "media", "num_rows": len(answers), "files": listing}
    run = {**RUN, "manifest": {"path": path, "fingerprint": fingerprint}, "throughput": throughput}
    rows = [result_row(number, id=name, text=text) for number, (name, text) in enumerate(answers.items())]
    return str(write_run(folder, rows, run=run))


def test_two_runs_over_one_folder_of_media_are_compared_by_the_media_s_names(tmp_path: Path) -> None:
    one = _media_run(tmp_path / "one", "/photos", {"a.jpg": "A", "b.jpg": "B", "d.jpg": "D"}, rows_per_s=2.0)
    other = _media_run(tmp_path / "other", "/photos", {"b.jpg": "B", "c.jpg": "C", "d.jpg": "?"}, rows_per_s=3.0)
    report = gather(one, baseline=other, options=_QUICK)
    page, markdown = render_html(report), render_markdown(report)
    for text in (page, markdown):
        assert "The same answer, letter for letter: 1 of 2 shared rows." in text and "manifests differ" not in text
    assert "Baseline other, 3 rows" in markdown and "3 rows/s" in markdown


def test_runs_of_other_manifests_are_compared_by_ids_that_one_row_has(tmp_path: Path) -> None:
    other_manifest = {**RUN, "manifest": {"path": "other", "fingerprint": {"num_rows": 4, "files": []}}}
    rows = [result_row(number, id=name, text=name) for number, name in enumerate(("a", "b", "twice", "twice"))]
    one, other = write_run(tmp_path / "one", rows), write_run(tmp_path / "other", rows[::-1], run=other_manifest)
    text = " ".join(_Tags(render_html(gather(str(one), baseline=str(other), options=_QUICK))).text.split())
    assert "The manifests differ, and rows are paired by id. The same answer, letter for letter: 2 of 2" in text
    strangers = write_run(tmp_path / "strangers", [result_row(0, id="x")], run=other_manifest)
    assert "No row is in both runs." in render_markdown(gather(str(one), baseline=str(strangers), options=_QUICK))


def test_markdown_names_the_baseline_and_the_settings_that_differ(tmp_path: Path) -> None:
    warm = {**RUN, "config": {**RUN["config"], "sampling": {"temperature": 0.5, "max_tokens": 32, "seed": None}}}
    one = write_run(tmp_path / "one", [result_row(number) for number in range(8)], run=warm)
    other = write_run(tmp_path / "other", [result_row(number) for number in range(8)])
    (line,) = [
        line
        for line in render_markdown(gather(str(one), baseline=str(other), options=_QUICK)).splitlines()
        if line.startswith("Baseline ")
    ]
    assert line == (
        "Baseline other, 8 rows: The same answer, letter for letter: 8 of 8 shared rows. 41.5 rows/s. "
        r"Settings that differ: sampling.temperature was 0.0, is 0.5; sampling.max\_tokens was 64, is 32."
    )
    assert "Baseline" not in render_markdown(gather(str(one), options=_QUICK))


def test_data_of_a_folder_of_media_is_its_media_not_their_listing(tmp_path: Path) -> None:
    run = _media_run(tmp_path / "run", "/photos", {"a.jpg": "A", "b.jpg": "B"})
    assert dict(gather(run, options=_QUICK).headline)["Data"] == "/photos, 2 files"


def test_one_of_a_thing_is_not_written_as_several(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [result_row(0), error_row(1, "FetchTimeout", "fetch", "late")])
    report = gather(str(folder), options=_QUICK)
    text = " ".join(_Tags(render_html(report)).text.split())
    assert "2 rows, 1 error (50.00 %)" in text and "1 answer, 1 error" in text
    alone = gather(str(write_run(tmp_path / "alone", [error_row(0, "FetchTimeout", "fetch", "late")])), options=_QUICK)
    assert "1 row, 1 error." in render_markdown(alone)
    assert "2 rows, 1 error." in render_markdown(report)
    for wrong in ("1 rows", "1 answers", "1 errors"):
        assert f" {wrong}" not in text and f" {wrong}" not in render_markdown(report)


def test_a_price_is_not_passed_over_in_silence_where_a_run_has_no_gpu_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_cpus = {**RUN, "placement": {"engine_actors": 1, "gpus_per_engine": 0.0}}
    for name, run in (("cpu", on_cpus), ("gpu", RUN)):
        folder = write_run(tmp_path / name, [result_row(0)], run=run)
        assert write_page([str(folder), "--price-per-gpu-hour", "2", "--no-thumbnails"]) == 0
        said = capsys.readouterr().err
        assert ("--price-per-gpu-hour is not used" in said) == (name == "cpu")


def test_markdown_fits_a_pull_request_and_escapes_what_it_shows(report: Report) -> None:
    text = render_markdown(report)
    assert "| Exact match |" in text and "| TruncatedMedia | decode | 2 |" in text
    assert "<script>" not in text and "\\<script\\>" in text
    assert len(text) < 5_000


def test_a_page_that_is_too_large_has_no_pictures(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_MAX_HTML_BYTES", 150_000)
    smaller = render_html(report)
    assert "base64" not in smaller and "no picture: left out to keep the page small" in smaller
    assert len(smaller.encode()) < 150_000


def test_the_same_folder_gives_the_same_gallery(rich: Path, report: Report) -> None:
    again = gather(str(rich), options=_QUICK)
    ids = [[card.id for card in section.cards] for section in again.sections]
    assert ids == [[card.id for card in section.cards] for section in report.sections]


def test_what_scores_leave_out_is_said_on_the_page_in_markdown_and_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [result_row(row, text="B", reference="B" if row < 8 else None) for row in range(10)]
    rows[0] = {**error_row(0, "FetchTimeout", "fetch", "late"), "reference": "B"}
    rows[1]["text"] = "no idea"
    candidate, baseline = write_run(tmp_path / "a", rows), write_run(tmp_path / "b", rows[:7])
    for folder in (candidate, baseline):
        write_scores(folder, metrics=("multiple_choice",), cluster="source")
    report = gather(str(candidate), baseline=str(baseline), options=_QUICK)
    found = {note.title: (note.num_rows, note.share) for note in report.scores.notes}
    assert found == {
        "No reference, not scored": (2, None),
        "Failed, counted as 0": (1, None),
        "Parse rate": (6, pytest.approx(6 / 7)),
        "Grouped by source": (None, None),
        "Only in this run, not compared": (3, None),
    }
    page, markdown = " ".join(_Tags(render_html(report)).text.split()), render_markdown(report)
    metrics = RunReader(str(candidate)).metrics or {}
    print_scores({**metrics, "baseline": compare_folders(str(candidate), str(baseline), num_samples=10)})
    console = " ".join(capsys.readouterr().out.split())
    for title in found:
        assert title in page and title in markdown.replace("\\", "") and title in console
    assert "on the 7 rows of both" in console and "85.7 %" in console
    assert "85.7 %" in page and "85.7 % of 7 multiple" in markdown
    assert "| 7 |" in markdown, "the rows that both runs have"
