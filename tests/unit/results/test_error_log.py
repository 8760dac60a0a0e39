"""errors.jsonl: failed rows with their row keys, over several runs, and no more of them than the file may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.manifest.row_set import RowNumbering
from pipeline.results import error_log
from pipeline.results.error_log import ErrorLog
from pipeline.results.fragments import FragmentWriter
from pipeline.results.parts import finalise, reopen
from pipeline.results.run_folder import RunFolder
from tests.unit.results.result_rows import new_folder, outcomes


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "__run" / "errors.jsonl").read_text().splitlines()]


def test_failed_rows_are_written_with_their_row_key_and_later_runs_add_theirs(tmp_path: Path) -> None:
    files = ["a.parquet", "b.parquet"]
    (tmp_path / "__run").mkdir()
    for _ in range(2):
        log = ErrorLog(RunFolder(str(tmp_path)), files)
        log.add(outcomes(None, "MediaNotFound", None, "MediaNotFound"))
        log.flush()
    written = lines(tmp_path)
    assert [(line["manifest_file"], line["manifest_row"]) for line in written] == [
        ("b.parquet", 1),
        ("b.parquet", 3),
    ] * 2
    assert written[0]["message"] == "no file für 1"
    assert written[0]["type"] == "MediaNotFound" and written[0]["stage"] == "fetch" and written[0]["id"] == "row 1"


def test_the_rows_that_failed_in_the_end_replace_the_log_when_the_parts_are_written(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([0, 3])
    log = ErrorLog(folder, ["a", "b"])
    for attempt in (outcomes("MediaNotFound", None, "MediaNotFound"), outcomes("FetchError")):
        out = FragmentWriter(folder, numbering, attempt.schema, 10, 60.0)
        out.add(attempt)
        out.flush()
        log.add(attempt)
    again = outcomes(None, None, None).slice(2)
    out.add(again)
    out.flush()
    log.flush()
    assert [line["type"] for line in lines(Path(folder.path))] == ["MediaNotFound", "MediaNotFound", "FetchError"]
    finalise(folder, numbering, again.schema, rows_per_part=2, errors=ErrorLog(folder, ["a", "b"], is_final=True))
    (line,) = lines(Path(folder.path))
    assert (line["manifest_file"], line["manifest_row"], line["type"]) == ("b", 0, "FetchError")
    reopen(folder, numbering)
    out.add(outcomes(None))
    out.flush()
    finalise(folder, numbering, again.schema, rows_per_part=2, errors=ErrorLog(folder, ["a", "b"], is_final=True))
    assert not Path(folder.file("errors.jsonl")).exists()


def test_without_failed_rows_there_is_no_file(tmp_path: Path) -> None:
    log = ErrorLog(RunFolder(str(tmp_path)), ["a"])
    log.add(outcomes(None, None))
    log.flush()
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_refuses_the_file_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError("The provided token has expired.")

    log = ErrorLog(RunFolder(str(tmp_path)), ["a", "b"])
    log.add(outcomes("MediaNotFound"))
    monkeypatch.setattr(error_log.storage, "publish", refuse)
    log.flush()


def test_the_file_ends_at_its_limit_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "__run").mkdir()
    monkeypatch.setattr(error_log, "MAX_LINES", 5)
    log = ErrorLog(RunFolder(str(tmp_path)), ["a", "b"])
    for _ in range(3):
        log.add(outcomes("MediaNotFound", "MediaNotFound", "MediaNotFound"))
    log.flush()
    written = lines(tmp_path)
    assert len(written) == 5
    assert written[-1] == {"message": "4 errors are shown; the results have them all"}
