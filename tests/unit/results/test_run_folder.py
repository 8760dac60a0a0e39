"""The run folder: what may be there before a run, and what a failed write leaves behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.errors import OutputError
from pipeline.manifest.row_set import RowNumbering
from pipeline.results.parts import finalise
from pipeline.results.run_folder import RunFolder
from tests.unit.results.result_rows import SCHEMA, new_folder, rows, writer


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("x")
    with pytest.raises(OutputError, match=r"thesis\.docx"):
        RunFolder(str(tmp_path)).prepare()


def test_a_folder_whose_first_run_was_refused_early_may_be_used_again(tmp_path: Path) -> None:
    (tmp_path / "__run").mkdir()
    (tmp_path / "__run" / "manifest.parquet").write_bytes(b"listing")
    (tmp_path / "__run" / "log.txt").write_text("")
    RunFolder(str(tmp_path)).prepare()


def test_a_file_is_no_folder_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("x")
    with pytest.raises(OutputError, match=r"README\.md is a file: choose a run folder, or as output\.path a folder"):
        RunFolder(str(file)).prepare()


def test_a_run_of_an_earlier_version_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(OutputError, match=r"a run of an earlier version.*choose an empty or new folder"):
        RunFolder(str(tmp_path)).prepare()


@pytest.mark.parametrize("content", ["{}", '{"manifest": null}', '{"manifest": {"fingerprint": {"files": []}}}'])
def test_a_run_json_that_names_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "__run").mkdir()
    (tmp_path / "__run" / "run.json").write_text(content)
    with pytest.raises(OutputError, match=r"__run/run\.json does not say which manifest.*put the run's own file back"):
        RunFolder(str(tmp_path)).prepare()


@pytest.mark.parametrize("existed", [True, False])
def test_what_a_refused_run_made_is_removed_and_nothing_else(tmp_path: Path, existed: bool) -> None:
    path = tmp_path / "a" / "out"
    if existed:
        path.mkdir(parents=True)
    folder = RunFolder(str(path))
    folder.prepare()
    Path(folder.file("manifest.parquet")).write_bytes(b"listing")
    folder.discard_unused()
    folder.delete_if_empty()
    assert path.exists() == existed
    assert not any(tmp_path.rglob("*.parquet"))
    folder.prepare()
    folder.write_run({"state": "running"})
    folder.discard_unused()
    folder.delete_if_empty()
    assert folder.read_run() is not None


def test_finished_rows_outlive_a_refusal_even_where_run_json_is_lost(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    out = writer(folder, RowNumbering([1]), 1)
    out.add(rows([(0, 0)]))
    folder.discard_unused()
    folder.delete_if_empty()
    assert len(folder.fragments()) == 1
    with pytest.raises(OutputError, match=r"no __run/run\.json"):
        folder.prepare()


def test_a_disk_without_room_is_an_output_error_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder, numbering = new_folder(tmp_path), RowNumbering([2])
    out = writer(folder, numbering, 100)
    out.add(rows([(0, 0), (0, 1)]))
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_room)
        for write in (out.flush, lambda: folder.write_run({"state": "running"})):
            with pytest.raises(OutputError, match=r"No space left on device.*run the same command"):
                write()
    assert [path for path in Path(folder.path).rglob("*") if path.is_file()] == []
    out.flush()
    assert finalise(folder, numbering, SCHEMA, rows_per_part=10) == 1
