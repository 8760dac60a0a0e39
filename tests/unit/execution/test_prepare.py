"""What a run that is refused leaves behind, and when a run's errors stop it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import CaptionConfig
from pipeline.config_file import load_config
from pipeline.errors import ConfigError, OutputError, TooManyErrors
from pipeline.execution.placement import Placement
from pipeline.execution.prepare import CaptionJob, hold, prepare
from pipeline.execution.progress import RunCounts
from pipeline.execution.run import finish
from pipeline.execution.stages import open_input
from pipeline.results.fragments import FragmentWriter, write_fragment
from pipeline.results.parts import finalise
from pipeline.results.run_folder import RunFolder
from pipeline.schema import result_schema
from tests.unit.results.result_rows import outcomes
from tests.unit.results.result_rows import rows as result_rows


def check(
    rows: int, failed: int, allowed: float | None, *, done_before: int = 0, at_end: bool = False, **others: int
) -> None:
    examples = {"MediaNotFound": ("row 7", "no file a.jpg")}
    errors = Counter(MediaNotFound=failed, **others)
    counts = RunCounts(10_000, done_before, rows=rows, errors=errors, examples=examples)
    config = SimpleNamespace(run=SimpleNamespace(max_error_fraction=allowed))
    CaptionJob.check_errors(SimpleNamespace(counts=counts, config=config, folder=RunFolder("out")), at_end=at_end)  # type: ignore[arg-type]


def test_without_a_setting_a_run_stops_where_nearly_all_of_its_first_rows_fail() -> None:
    check(199, 199, None)
    check(200, 190, None)
    with pytest.raises(TooManyErrors, match=r"195 of 200 rows failed.*not set: 0\.95\) allows"):
        check(200, 195, None)
    check(200, 200, None, done_before=5_000)  # most rows of the folder have answers


def test_a_stop_lists_the_error_types_line_by_line_and_says_how_to_go_on() -> None:
    with pytest.raises(TooManyErrors) as stop:
        check(100, 50, 0.5, A=2, B=7, C=1, D=1)
    first, *kinds, last = str(stop.value).splitlines()
    assert first == "61 of 100 rows failed (61%), more than run.max_error_fraction 0.5 allows:"
    assert kinds == ["  50 MediaNotFound, as row row 7: no file a.jpg", "  7 B", "  2 A", "  2 more error types"]
    assert last.startswith("out/__run/errors.jsonl lists the failed rows") and "--run.max_error_fraction 1" in last


def test_without_a_setting_a_run_that_reached_its_end_keeps_its_results() -> None:
    check(300, 300, None, at_end=True)


def test_a_setting_is_judged_after_a_hundred_rows_and_at_the_end() -> None:
    check(99, 99, 0.1)
    check(100, 10, 0.1)
    for rows, at_end in ((100, False), (5, True)):
        with pytest.raises(TooManyErrors):
            check(rows, rows, 0.1, at_end=at_end)
    check(10_000, 10_000, 1.0, at_end=True)


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(ConfigError), hold(RunFolder(str(path))):
        raise ConfigError("no such column")
    assert not path.exists()


def test_a_run_that_is_kept_out_takes_nothing_from_the_one_that_has_begun(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "out"))
    with hold(folder):
        folder.publish(folder.file("manifest.parquet"), b"listing")
        with pytest.raises(OutputError), hold(RunFolder(folder.path)):
            raise AssertionError("two runs in one folder")
        folder.guard()
        folder.write_run({"state": "running"})
        assert Path(folder.file("manifest.parquet")).exists() and Path(folder.file("fragments")).is_dir()


@pytest.mark.parametrize(("template", "is_noted"), [("{question}", False), ("Say it in French.", True)])
def test_rows_that_make_their_own_prompts_are_not_said_to_be_unknown_to_the_checkpoint(
    tmp_path: Path, template: str, is_noted: bool
) -> None:
    pq.write_table(pa.table({"question": ["How many circles?"], "image": ["a.png"]}), tmp_path / "rows.parquet")
    values = {"input.path": str(tmp_path / "rows.parquet"), "model.path": "demo", "output.path": str(tmp_path / "out")}
    config = load_config(CaptionConfig, None, {**values, "prompt.template": template})
    with hold(folder := RunFolder(config.output.path)):
        job = prepare(config, folder)
    assert job is not None and any("trained on a few prompts" in note for note in job.notes) == is_noted


_PLACEMENT = Placement(1, 1.0, 2, 1.0, 1.0, 1, (1, 1), (2, 2))
"""Two engines with a GPU each."""


def finished_run(tmp_path: Path, source: Path, **values: str) -> tuple[CaptionConfig, RunFolder]:
    """A finished run over the source, in which every row is an error."""
    settings = {"input.path": str(source), "model.path": "demo", "output.path": str(tmp_path / "out"), **values}
    config, folder = load_config(CaptionConfig, None, settings), RunFolder(str(tmp_path / "out"))
    folder.prepare()
    job = prepare(config, folder)
    assert job is not None
    job.start(_PLACEMENT)
    table = outcomes(*["MediaNotFound"] * job.numbering.num_rows)
    files = pa.array([0] * table.num_rows, table.schema.field("manifest_file").type)
    table = table.set_column(table.schema.get_field_index("manifest_file"), "manifest_file", files)
    job.counts.add(table)
    writer = FragmentWriter(folder, job.numbering, table.schema, 1, 60.0)
    for row in range(table.num_rows):
        writer.add(table.slice(row, 1))
    writer.flush()
    finish(job)
    return config, folder


def test_a_finished_folder_that_lost_its_success_is_not_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"prompt": ["a?", "b?"]}), tmp_path / "rows.parquet")
    config, folder = finished_run(tmp_path, tmp_path / "rows.parquet")
    assert not Path(folder.file("fragments")).exists()
    folder.mark_unfinished()
    assert prepare(config, folder) is None
    printed = capsys.readouterr().out
    assert "had no _SUCCESS, but its part files hold every row" in printed and "is finished: 2 rows" in printed
    assert folder.is_finished()
    folder.mark_unfinished()
    Path(folder.parts()[0]).unlink()
    job = prepare(config, folder)
    assert job is not None and len(job.finished.done) == 0, "nothing is left of it"


def test_success_that_is_lost_after_a_kill_in_the_middle_of_removing_fragments_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(folder: RunFolder) -> None:
        folder.delete(folder.fragments()[0])
        raise InterruptedError

    pq.write_table(pa.table({"prompt": ["a?", "b?", "c?"]}), tmp_path / "rows.parquet")
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(RunFolder, "delete_fragments", killed)
        finished_run(tmp_path, tmp_path / "rows.parquet")
    folder = RunFolder(str(tmp_path / "out"))
    assert len(folder.fragments()) == 2 and folder.is_finished()
    folder.mark_unfinished()
    values = {"input.path": str(tmp_path / "rows.parquet"), "model.path": "demo", "output.path": folder.path}
    assert prepare(load_config(CaptionConfig, None, values), folder) is None
    assert "is finished: 3 rows" in capsys.readouterr().out
    assert folder.is_finished() and folder.fragments() == []


@pytest.mark.parametrize("retry_failed", [None, "MediaTimeout"])
@pytest.mark.parametrize("counts", [{}, {"counts": {"rows": 2, "done": 0, "failed": 0}}])
def test_the_record_of_a_run_that_was_killed_right_after_its_success_is_completed_also_with_nothing_to_retry(
    tmp_path: Path, counts: dict[str, Any], retry_failed: str | None
) -> None:
    pq.write_table(pa.table({"prompt": ["a?", "b?"]}), tmp_path / "rows.parquet")
    config, folder = finished_run(tmp_path, tmp_path / "rows.parquet")
    record = folder.read_run() or {}
    folder.write_run({**{name: record[name] for name in record if name != "counts"}, "state": "running", **counts})
    Path(folder.file("fragments")).mkdir()
    again = config.model_copy(update={"run": config.run.model_copy(update={"retry_failed": retry_failed})})
    assert prepare(again, folder) is None
    found = folder.read_run() or {}
    assert (found["state"], found["errors"]) == ("finished", {"MediaNotFound": 2})
    assert found["counts"] == {"rows": 2, "done": 2, "failed": 2}
    assert not Path(folder.file("fragments")).exists()


def test_times_and_counts_of_all_runs_are_added_up_a_killed_one_s_as_far_as_it_noted_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    pq.write_table(pa.table({"prompt": ["a?"] * 9}), tmp_path / "rows.parquet")
    values = {"input.path": str(tmp_path / "rows.parquet"), "model.path": "demo", "output.path": str(tmp_path / "out")}
    config, folder = load_config(CaptionConfig, None, values), RunFolder(str(tmp_path / "out"))
    folder.prepare()
    table = outcomes(None, None, None)
    table = table.set_column(table.schema.get_field_index("num_output_tokens"), "num_output_tokens", pa.array([5] * 3))
    for ends in ("killed", "killed", "interrupted"):
        job = prepare(config, folder)
        assert job is not None
        job.counts.started = job._noted = clock[0]
        job.start(_PLACEMENT)
        clock[0] += 90.0
        job.counts.rows_started = clock[0] - 30.0
        job.counts.add(table)
        job.note_pace()
        clock[0] += 10.0
        job.counts.add(table)
        job.note_pace()  # too soon after the last time
        if ends != "killed":
            job.close(ends)
    record = folder.read_run()
    assert record is not None
    assert record["totals"] == {
        "runs": 3, "rows": 3 + 3 + 6, "seconds": 90 + 90 + 100, "gpu_seconds": 2 * 280, "row_seconds": 30 + 30 + 40,
        "prompt_tokens": 0, "visual_tokens": 0, "output_tokens": 15 + 15 + 30,
    }  # fmt: skip
    assert record["throughput"]["seconds"] == 100 and record["counts"]["this_run"] == 6


def test_a_finished_folder_of_photos_says_which_list_it_uses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"1")
    config, folder = finished_run(tmp_path, photos)
    record = folder.read_run()
    assert record is not None and record["manifest"]["listed"] == record["started"]
    (photos / "b.jpg").write_bytes(b"2")
    assert prepare(config, folder) is None
    printed = capsys.readouterr().out
    assert "is finished: 1 row, 1 error; --retry-failed" in printed
    assert f"listed at {record['started']}; --on-change=new-rows looks for new ones" in printed
    again = config.model_copy(update={"run": config.run.model_copy(update={"retry_failed": "MediaNotFound"})})
    folder.write_run(record | {"manifest": record["manifest"] | {"listed": "that day"}})
    retried = prepare(again, folder)
    assert retried is not None and retried.record["manifest"]["listed"] == "that day", "the list is still that one"
    anew = config.model_copy(update={"run": config.run.model_copy(update={"on_change": "new-rows"})})
    job = prepare(anew, folder)
    assert job is not None and job.numbering.num_rows == 2
    assert job.record["manifest"]["listed"] == job.record["started"]


def test_a_refused_or_killed_run_that_listed_new_photos_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"1")
    config, folder = finished_run(tmp_path, photos)
    files = sorted(path for path in Path(folder.path).rglob("*") if path.is_file())
    (photos / "b.jpg").write_bytes(b"2")
    anew = config.model_copy(update={"run": config.run.model_copy(update={"on_change": "new-rows"})})
    other = anew.model_copy(update={"sampling": replace(config.sampling, max_tokens=9)})
    with pytest.raises(OutputError, match="max_tokens"), hold(folder):
        prepare(other, folder)
    assert sorted(path for path in Path(folder.path).rglob("*") if path.is_file()) == files
    open_input(anew, folder)  # and is killed
    assert Path(folder.file("manifest-001.parquet")).exists()
    with hold(folder):
        assert prepare(config, folder) is None
    open_input(anew, folder)
    (photos / "b.jpg").rename(photos / "c.jpg")
    with hold(folder):
        job = prepare(anew, folder)
        assert job is not None and [file.num_rows for file in job.manifest.files] == [1, 1]
        assert pq.read_table(job.manifest.files[1].path).column("image").to_pylist() == ["c.jpg"]
        job.start(_PLACEMENT)
    with hold(folder):
        resumed = prepare(config, folder)
    assert resumed is not None and resumed.manifest.files == job.manifest.files


@pytest.mark.parametrize("names", ["as now", "whole paths, as older versions recorded them"])
def test_a_run_folder_over_photos_may_be_moved(tmp_path: Path, names: str) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"1")
    config, folder = finished_run(tmp_path, photos)
    (photos / "b.jpg").write_bytes(b"2")
    anew = {"run": config.run.model_copy(update={"on_change": "new-rows"})}
    job = prepare(config.model_copy(update=anew), folder)
    assert job is not None
    job.start(_PLACEMENT)
    record = folder.read_run() or {}
    files = record["manifest"]["fingerprint"]["files"]
    assert [name for name, *_ in files] == ["manifest.parquet", "manifest-001.parquet"]
    if names != "as now":
        record["manifest"]["fingerprint"]["files"] = [[folder.file(name), *facts] for name, *facts in files]
        folder.write_run(record)
    moved = Path(folder.path).rename(tmp_path / "moved")
    (photos / "c.jpg").write_bytes(b"3")
    for updates, num_rows in (({}, 2), (anew, 3)):
        job = prepare(config.model_copy(update=updates), RunFolder(str(moved)))
        assert job is not None and len(job.finished.done) == 1 and job.numbering.num_rows == num_rows


def test_a_line_added_to_a_manifest_file_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    source = tmp_path / "rows"
    source.mkdir()
    (source / "list.csv").write_text("prompt\na?\nb?\n")
    config, folder = finished_run(tmp_path, source / "list.csv", **{"run.on_change": "new-rows"})
    (source / "list.csv").write_text("prompt\na?\nb?\nc?\n")
    with pytest.raises(OutputError) as refusal:
        prepare(config, folder)
    assert "list.csv had 2 rows and has 3" in str(refusal.value)
    assert "put new rows into another file of the folder" in str(refusal.value)
    assert "settings" not in str(refusal.value).splitlines()[-1]
    (source / "list.csv").write_text("prompt\na?\nb?\n")
    (source / "more.csv").write_text("prompt\nc?\n")
    whole = config.model_copy(update={"input": config.input.model_copy(update={"path": str(source)})})
    job = prepare(whole, folder)
    assert job is not None and job.numbering.num_rows == 3 and len(job.finished.done) == 2


@pytest.mark.parametrize("columns", [["n"], ["n", "seed"]])
def test_columns_that_are_named_like_settings_are_pointed_out(tmp_path: Path, columns: list[str]) -> None:
    pq.write_table(pa.table({"prompt": ["a?"], **{name: [1] for name in columns}}), tmp_path / "rows.parquet")
    values = {"input.path": str(tmp_path / "rows.parquet"), "model.path": "demo", "output.path": str(tmp_path / "out")}
    folder = RunFolder(str(tmp_path / "out"))
    folder.prepare()
    job = prepare(load_config(CaptionConfig, None, values), folder)
    names = ", ".join(columns)
    assert job is not None and any(
        f"named like settings are not read as such: {names}; input.settings [{names}]" in note for note in job.notes
    )


def test_a_run_goes_on_in_the_dtype_that_its_first_engine_picked(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a?"]}), tmp_path / "rows.parquet")
    values = {
        "input.path": str(tmp_path / "rows.parquet"),
        "model.path": "demo",
        "output.path": str(tmp_path / "out"),
    }
    config, folder = load_config(CaptionConfig, None, values), RunFolder(str(tmp_path / "out"))
    folder.prepare()
    job = prepare(config, folder)
    assert job is not None and job.stages.generate.engine.dtype == "auto"
    assert job.note_engines([{"kind": "preprocess"}, {"kind": "engine", "loading": "starting"}]) is None
    engine = {"kind": "engine", "describe": {"dtype": "bfloat16", "dtype_reason": "native to this CPU"}}
    assert job.note_engines([engine]) == "model in bfloat16: native to this CPU"
    assert job.note_engines([engine]) is None
    assert job.record["model"]["published_sampling"]["temperature"] == 0.0 and job.notes == ()
    again = prepare(config, folder)  # after a crash, perhaps on another machine
    assert again is not None and again.stages.generate.engine.dtype == "bfloat16"
    assert "the run goes on in bfloat16, in which it began" in again.notes
    other = load_config(CaptionConfig, None, {**values, "model.dtype": "float32"})
    with pytest.raises(OutputError, match=r"model\.dtype: was 'auto', is 'float32'"):
        prepare(other, folder)


def finished_with(config: CaptionConfig, kept: Any) -> RunFolder:
    """A finished folder of one row, whose kept column `k` has this value."""
    folder = RunFolder(config.output.path)
    with hold(folder):
        job = prepare(config, folder)
        assert job is not None
        folder.write_run(job.record)
        schema = result_schema(job.kept)
        table = (
            result_rows([(0, 0)]).drop_columns(["tag"]).append_column("k", pa.array([kept], job.kept.field("k").type))
        )
        write_fragment(folder, "1-0", table.select(schema.names), job.numbering)
        finalise(folder, job.numbering, schema, rows_per_part=10)
    return folder


def widened(tmp_path: Path, suffix: str, first: Any, second: Any) -> tuple[CaptionConfig, RunFolder, Path]:
    """A finished run over one file, beside which there is a second one now, whose column `k` has another kind."""
    (tmp_path / "in").mkdir()
    paths = [tmp_path / "in" / f"{name}{suffix}" for name in ("a", "b")]

    def write(path: Path, value: Any) -> None:
        if suffix == ".parquet":
            pq.write_table(pa.table({"prompt": ["a?"], "k": [value]}), path)
        else:
            path.write_text(json.dumps({"prompt": "a?", "k": value}))

    write(paths[0], first)
    values = {"input.path": str(tmp_path / "in"), "input.keep": "[k]", "model.path": "demo"}
    values |= {"output.path": str(tmp_path / "out")}
    folder = finished_with(load_config(CaptionConfig, None, values), first)
    write(paths[1], second)
    return load_config(CaptionConfig, None, values | {"run.on_change": "new-rows"}), folder, paths[1]


def test_new_files_whose_type_can_not_hold_the_results_are_refused_and_the_folder_stays_finished(
    tmp_path: Path,
) -> None:
    config, folder, new_file = widened(tmp_path, ".parquet", 2**60 + 1, 0.5)
    parts = [Path(part).read_bytes() for part in folder.parts()]
    reason = r"column k is int64; with the manifest's new files it is double, which can't hold.*1152921504606846977"
    for _ in range(2):
        with pytest.raises(OutputError, match=reason), hold(folder):
            prepare(config, folder)
        assert folder.is_finished() and [Path(part).read_bytes() for part in folder.parts()] == parts
    new_file.unlink()
    with hold(folder):
        assert prepare(config, folder) is None


@pytest.mark.parametrize(
    ("suffix", "first", "second", "found"),
    [
        (".jsonl", [1, 2], "none", "[1, 2]"),
        (".jsonl", 2**60 + 1, 0.5, "1152921504606846977"),
        (".jsonl", True, "none", "true"),
        (".jsonl", 1.0, "none", "1.0"),
        (".parquet", 2**53, 0.5, 2.0**53),
    ],
)
def test_new_files_may_widen_the_type_of_a_kept_column(
    suffix: str, first: Any, second: Any, found: Any, tmp_path: Path
) -> None:
    config, folder, _ = widened(tmp_path, suffix, first, second)
    with hold(folder):
        job = prepare(config, folder)
        assert job is not None and not folder.is_finished()
        schema = result_schema(job.kept)
        new = pa.array([None], job.kept.field("k").type)
        table = result_rows([(1, 0)]).drop_columns(["tag"]).append_column("k", new)
        write_fragment(folder, "2-0", table.select(schema.names), job.numbering)
        finalise(folder, job.numbering, schema, rows_per_part=10)
    assert pq.read_table(folder.parts()[0]).column("k").to_pylist() == [found, None]
