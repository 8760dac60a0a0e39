"""What a run prints at its end."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from jobs import caption
from pipeline.execution.progress import RunCounts
from pipeline.execution.summary import pace_text, print_samples, print_summary
from pipeline.results.run_folder import RunFolder
from tests.unit.report.runs import result_row, write_run
from tests.unit.results.result_rows import outcomes


def summary(tmp_path: Path, counts: RunCounts, errors: dict[str, int] | None = None) -> str:
    console = Console(file=io.StringIO(), width=300)
    print_summary(console, counts, RunFolder(str(tmp_path)), errors or counts.errors, None)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_each_error_type_is_shown_with_its_count_an_example_and_the_next_command(tmp_path: Path) -> None:
    counts = RunCounts(total=4, done_before=0)
    counts.add(outcomes(None, "MediaNotFound", "MediaNotFound", "MediaTimeout"))
    text = summary(tmp_path, counts)
    assert "4 of 4 (3 errors)" in text
    assert "2 MediaNotFound, as row row 1: no file für 1" in text
    assert "1 MediaTimeout, as row row 3: no file für 3" in text
    assert "errors.jsonl lists them" in text and "--retry-failed=MediaNotFound,..." in text
    assert "EVERY ROW FAILED" not in text


def test_errors_of_earlier_runs_are_counted_too(tmp_path: Path) -> None:
    counts = RunCounts(total=3, done_before=2, failed_before=1)
    counts.add(outcomes(None))
    assert "1 MediaTimeout" in summary(tmp_path, counts, {"MediaTimeout": 1})


def test_a_run_without_any_answer_says_so_loudly(tmp_path: Path) -> None:
    counts = RunCounts(total=2, done_before=0)
    counts.add(outcomes("MediaNotFound", "MediaNotFound"))
    assert "EVERY ROW FAILED: 0 of 2 rows answered" in summary(tmp_path, counts)
    assert "EVERY ROW FAILED" not in summary(tmp_path, RunCounts(total=0, done_before=0))


def test_start_up_and_pace_are_told_apart(monkeypatch: Any) -> None:
    counts = RunCounts(total=3_000, done_before=2_994, rows=6, output_tokens=60, started=100.0, rows_started=158.0)
    counts.last_row = 170.0
    monkeypatch.setattr("time.monotonic", lambda: 171.0)
    assert pace_text(counts) == "6 rows in 1 min 11 s: 58 s to start, then 30.0 rows/min, 5 tokens/s"


def test_messages_with_line_breaks_take_one_line(tmp_path: Path) -> None:
    counts = RunCounts(total=1, done_before=0, rows=1, errors=Counter({"X": 1}), examples={"X": ("a", "1\n2\x1b[31m")})
    assert "as row a: 1 2 [31m" in summary(tmp_path, counts)


def test_the_traceback_of_a_fault_that_nobody_foresaw_is_shown_in_full_and_once(tmp_path: Path) -> None:
    message = "KeyError: 'x'; not foreseen\nTraceback [most recent call last]:\n  at line 3\n"
    counts = RunCounts(total=2, done_before=0, rows=2, errors=Counter({"InternalError": 2}))
    counts.examples["InternalError"] = ("a", message)
    assert summary(tmp_path, counts).count(f"InternalError, as row a: {message}") == 1


def test_a_right_answer_is_marked_right_among_several_references() -> None:
    console = Console(file=io.StringIO(), width=200)
    answers = {"one of two": ["a", "one of two"], "other": ["x"], "free": []}
    print_samples(console, [{"text": text, "references": references} for text, references in answers.items()])
    assert isinstance(console.file, io.StringIO)
    marks = {
        text: line.split("│")[-2].strip()
        for line in console.file.getvalue().splitlines()
        for text in answers
        if f" {text} " in line.split("|")[0]
    }
    assert marks == {"one of two": "✓", "other": "✗", "free": ""}


def end_of_a_job(folder: Path, kept: pa.Schema) -> str:
    job = SimpleNamespace(
        config=SimpleNamespace(output=SimpleNamespace(report=False)),
        counts=RunCounts(total=3, done_before=3),
        folder=RunFolder(str(folder)),
        record={"errors": {}, "bottleneck": None},
        kept=kept,
    )
    console = Console(file=io.StringIO(), width=200)
    caption.report(job, console)  # type: ignore[arg-type]
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_one_row_of_each_task_is_shown_also_where_tasks_are_lists(tmp_path: Path) -> None:
    kept = pa.schema([("prompt", pa.string()), ("reference", pa.string()), ("task", pa.list_(pa.string()))])
    tasks = [["x"], ["x"], ["y"], ["z"]] * 2  # of which the first part has half
    rows = [result_row(number, task=task, text=f"caption {number}") for number, task in enumerate(tasks)]
    text = end_of_a_job(write_run(tmp_path / "run", rows, kept=kept), kept)
    assert "['x'] │ caption 0" in text and "['y'] │ caption 2" in text and "caption 1" not in text


def test_samples_that_can_not_be_shown_do_not_end_a_complete_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ValueError("no text")

    monkeypatch.setattr(caption, "print_samples", fail)
    kept = pa.schema([("prompt", pa.string()), ("reference", pa.string())])
    text = end_of_a_job(write_run(tmp_path / "run", [result_row(0)], kept=kept), kept)
    assert "3 of 3 (0 errors)" in text and "the sample of rows can't be shown: ValueError: no text" in text
