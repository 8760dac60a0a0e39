"""The caption job, end to end on a real Ray: every manifest and medium form, good and bad rows, resume, retry."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.caption import main
from pipeline.demo import CHECKPOINT
from pipeline.demo.check import check
from pipeline.demo.manifest import write_demo_world
from pipeline.execution.placement import Placement
from pipeline.execution.prepare import CaptionJob
from pipeline.schema import result_schema

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = "[max_tokens, seed, temperature, max_pixels, fps, num_frames, start_s, end_s]"

pytestmark = pytest.mark.usefixtures("ray_with_two_cpus")


def caption(source: Path, output: Path, *words: str, max_tokens: int = 8) -> int:
    return main(
        [
            *("--input.path", str(source), "--output.path", str(output), "--model.path", "demo"),
            *("--input.settings", SETTINGS, "--input.allow_missing_media", "true"),
            *("--sampling.max_tokens", str(max_tokens), *words),
        ]
    )


def results(output: Path) -> list[dict[str, Any]]:
    parts = sorted(output.glob("part-*.parquet"))
    assert parts, f"no part files in {list(output.iterdir())}"
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.end_to_end
def test_one_manifest_may_mix_every_kind_of_row_good_and_bad(tmp_path: Path, photos: Path, clips: Path) -> None:
    shutil.copy(photos / "astronaut.png", tmp_path / "astronaut.png")
    shutil.copy(photos / "rocket.jpg", tmp_path / "rocket.jpg")
    shutil.copy(clips / "bikes.mp4", tmp_path / "bikes.mp4")
    (tmp_path / "page.png").write_text("<html>not found</html>")
    inline = "data:image/jpeg;base64," + base64.b64encode((tmp_path / "rocket.jpg").read_bytes()).decode()
    rows: list[dict[str, Any]] = [
        {"id": "image", "image": "astronaut.png", "prompt": "Who is this?"},
        {"id": "images", "images": ["astronaut.png", inline], "prompt": "Compare."},
        {"id": "video", "video": "bikes.mp4", "prompt": "What happens?", "num_frames": 4},
        {"id": "segment", "video": "bikes.mp4", "prompt": "And here?", "start_s": 2.0, "end_s": 4.0, "fps": 2.0},
        {"id": "text", "prompt": "Name a colour."},
        {
            "id": "mixed",
            "messages": [
                {"role": "system", "content": "Be brief."},
                *user(
                    {"type": "video", "path": "bikes.mp4", "num_frames": 4},
                    text("then"),
                    {"type": "image", "url": inline},
                ),
                {"role": "assistant", "content": "Bikes."},
                *user(text("Sure?")),
            ],
        },
        {"id": "openai", "messages": user({"type": "image_url", "image_url": {"url": "rocket.jpg"}}, text("?"))},
        {"id": "small", "image": "astronaut.png", "prompt": "?", "max_pixels": 28 * 28 * 4, "max_tokens": 3},
        {"id": "missing", "image": "nowhere.png", "prompt": "?"},
        {"id": "html", "image": "page.png", "prompt": "?"},
        {"id": "outside", "image": "/etc/hostname", "prompt": "?"},
        {"id": "reserved", "prompt": "Look: <|image_pad|>"},
        {"id": "setting", "image": "astronaut.png", "prompt": "?", "fps": 2.0},
        {"id": "sampling", "prompt": "?", "temperature": -1.0},
        {"id": "nothing"},
        {"id": "role", "messages": [{"role": "robot", "content": "?"}]},
    ]
    output = tmp_path / "out"
    assert caption(jsonl(tmp_path / "rows.jsonl", rows), output) == 0
    found = {row["id"]: row for row in results(output)}
    assert list(found) == [row["id"] for row in rows]
    errors = {name: (row["error_stage"], row["error_type"]) for name, row in found.items() if row["status"] == "error"}
    assert errors == {
        "missing": ("fetch", "MediaNotFound"),
        "html": ("decode", "UnsupportedMedia"),
        "outside": ("fetch", "AccessDenied"),
        "reserved": ("prompt", "ReservedTokenError"),
        "setting": ("prompt", "SettingError"),
        "sampling": ("prompt", "SettingError"),
        "nothing": ("prompt", "MessageError"),
        "role": ("prompt", "MessageError"),
    }
    for row in found.values():
        assert row["attempts"] == 1
        assert (row["text"] is None) == (row["status"] == "error")
        assert (row["error_message"] is None) == (row["status"] == "ok")
    assert [medium["kind"] for medium in found["mixed"]["media"]] == ["video", "image"]
    assert found["video"]["media"][0]["grid_thw"][0] == 2
    assert len(found["video"]["media"][0]["timestamps"]) == 4
    assert all(2.0 <= second <= 4.0 for second in found["segment"]["media"][0]["timestamps"])
    assert found["small"]["num_visual_tokens"] == 4
    assert found["small"]["num_output_tokens"] <= 3
    assert found["image"]["media"][0]["source_width"] == 512
    assert found["image"]["num_prompt_tokens"] > found["image"]["num_visual_tokens"] > 0
    schema = pq.read_schema(output / "part-00000.parquet")
    assert schema.equals(result_schema(pa.schema([])))
    record = json.loads((output / "__run" / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["errors"]["SettingError"] == 2
    told = [json.loads(line) for line in (output / "__run" / "errors.jsonl").read_text().splitlines()]
    assert {line["id"]: (line["stage"], line["type"]) for line in told} == errors
    assert all(rows[line["manifest_row"]]["id"] == line["id"] for line in told)
    assert all("time" not in line for line in told), "the lines are those of the parts, in place of the run's own"
    assert {line["manifest_file"] for line in told} == {str(tmp_path / "rows.jsonl")}
    assert "nowhere.png" in next(line["message"] for line in told if line["id"] == "missing")
    assert record["engine"]["device"].startswith("cpu")
    assert not (output / "__run" / "fragments").exists()
    assert (output / "_SUCCESS").exists()


def test_embedded_bytes_and_structs_in_parquet_and_kept_columns(tmp_path: Path, photos: Path) -> None:
    data = (photos / "rocket.jpg").read_bytes()
    table = pa.table(
        {
            "picture": pa.array([{"bytes": data, "path": "x.jpg"}, {"bytes": None, "path": "rocket.jpg"}]),
            "question": ["What?", "Where?"],
            "score": pa.array([1.5, None], pa.float32()),
            "tags": pa.array([["a", "b"], []], pa.list_(pa.string())),
        }
    )
    shutil.copy(photos / "rocket.jpg", tmp_path / "rocket.jpg")
    pq.write_table(table, tmp_path / "m.parquet")
    words = [
        "--input.columns",
        '{"image": "picture"}',
        "--prompt.template",
        "{question} Answer:",
        "--input.keep",
        "[tags, score]",
    ]
    assert caption(tmp_path / "m.parquet", tmp_path / "out", *words) == 0
    found = results(tmp_path / "out")
    assert [row["status"] for row in found] == ["ok", "ok"]
    assert found[0]["text"] is not None
    assert found[0]["media"][0]["grid_thw"] == found[1]["media"][0]["grid_thw"]
    assert [(row["tags"], row["score"]) for row in found] == [(["a", "b"], 1.5), ([], None)]
    kept = pq.read_schema(tmp_path / "out" / "part-00000.parquet")
    assert kept.field("score").type == pa.float32()
    assert kept.field("tags").type == pa.list_(pa.string())


def test_the_sample_of_answers_has_a_row_of_each_task_also_where_tasks_are_folders(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "Hello.", "task": f"task-{number % 3}", "reference": "Hi."} for number in range(6)]
    source = jsonl(tmp_path / "m.jsonl", rows)
    words = ["--input.keep", "[task, reference]", "--output.partition_by", "task"]
    assert caption(source, tmp_path / "out", *words) == 0
    sample = capfd.readouterr().out.partition("a few rows")[2]
    assert all(f"task-{number}" in sample for number in range(3))


def test_a_bare_folder_is_captioned_with_the_config_s_prompt(
    tmp_path: Path, photos: Path, clips: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(photos / "coffee.png", folder / "deep" / "b.png")
    shutil.copy(photos / "rocket.jpg", folder / "a.jpg")
    shutil.copy(clips / "carphone_distorted.mp4", folder / "c.mp4")
    (folder / "notes.txt").write_text("not a picture")
    shutil.copy(photos / "rocket.jpg", os.path.join(os.fsencode(folder), b"\xff.jpg"))
    output = folder / "out"
    command = ["--config", str(ROOT / "configs/demo.yaml"), f"--input.path={folder}", f"--output.path={output}"]
    assert main(command) == 0
    ids = ["a.jpg", "c.mp4", "deep/b.png", "\\xff.jpg"]
    assert [(row["id"], row["status"]) for row in results(output)] == [(name, "ok") for name in ids]
    note = "left alone: 1 file that is neither image nor video (1 .txt)"
    assert note in capfd.readouterr().out and note in (output / "__run/log.txt").read_text()
    assert json.loads((output / "__run/run.json").read_text())["manifest"]["notes"] == [note]
    assert note in (output / "_report.html").read_text()
    assert main(command) == 0, "the output below the input is none of it"
    assert "is finished: 4 rows" in capfd.readouterr().out


def test_several_answers_with_logprobs_and_seeds_come_the_same_again(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say something {i}.", "seed": i} for i in range(3)]
    words = ["--sampling.n", "2", "--sampling.temperature", "1.0", "--sampling.logprobs", "true"]
    source = jsonl(tmp_path / "m.jsonl", rows)
    for name in ("a", "b"):
        assert caption(source, tmp_path / name, *words) == 0
    first, second = results(tmp_path / "a"), results(tmp_path / "b")
    assert [row["texts"] for row in first] == [row["texts"] for row in second]
    assert all(len(row["texts"]) == 2 and row["texts"][0] == row["text"] for row in first)
    assert all(row["logprobs"] and max(row["logprobs"]) <= 0 for row in first)


def test_failed_rows_are_run_again_when_asked_and_the_others_left_alone(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"image": "late.png", "prompt": "?"}, {"prompt": "Hello."}, {"prompt": "<|im_end|>"}]
    source, output = jsonl(tmp_path / "m.jsonl", rows), tmp_path / "out"
    assert caption(source, output) == 0
    before = results(output)
    assert [row["error_type"] for row in before] == ["MediaNotFound", None, "ReservedTokenError"]
    files = {path.name: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert caption(source, output, "--retry-failed=MediaTimeout") == 0
    assert "has no such errors to run again: it has 1 MediaNotFound, 1 ReservedTokenError" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == files
    shutil.copy(photos / "coffee.png", tmp_path / "late.png")
    assert caption(source, output, "--retry-failed=FetchError") == 0
    after = results(output)
    assert [(row["status"], row["attempts"]) for row in after] == [("ok", 2), ("ok", 1), ("error", 1)]
    assert after[1] == before[1]
    assert after[2] == before[2]


def test_a_finished_folder_is_left_alone_and_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = jsonl(tmp_path / "m.jsonl", [{"prompt": "Hello."}]), tmp_path / "out"
    assert caption(source, output) == 0
    before = {path.name: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    capsys.readouterr()
    monkeypatch.setattr("jobs.caption.run_on_ray", None)
    assert caption(source, output) == 0
    assert "is finished: 1 row, 0 errors" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before
    # Nor was the manifest opened: there is nothing in it any more, and its listing does not show that.
    size, times = source.stat().st_size, source.stat()
    source.write_text("\n" * size)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert caption(source, output) == 0
    assert "is finished: 1 row" in capsys.readouterr().out
    os.utime(source)
    assert caption(source, output) == 2
    assert "m.jsonl had 1 row and has 0" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["_place", "finalise"])
def test_a_run_that_is_stopped_before_its_first_row_or_after_its_last_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], moment: str
) -> None:
    source, output = jsonl(tmp_path / "m.jsonl", [{"prompt": "Hello."}]), tmp_path / "out"

    def stopped(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    done = int(moment == "finalise")
    with monkeypatch.context() as patch:
        patch.setattr(f"pipeline.execution.run.{moment}", stopped)
        assert caption(source, output) == 130
    assert f"stopped with {done} of 1 row done; the same command resumes" in capfd.readouterr().out
    assert not (output / "__run" / ".lease").exists() and not (output / "_SUCCESS").exists()
    if done:
        record = json.loads((output / "__run" / "run.json").read_text())
        assert (record["state"], record["counts"]["done"]) == ("interrupted", 1)
    else:
        assert not (output / "__run" / "run.json").exists(), "nothing is done, so the folder takes any settings"
    assert caption(source, output) == 0
    assert [row["status"] for row in results(output)] == ["ok"]
    assert json.loads((output / "__run" / "run.json").read_text())["counts"]["this_run"] == 1 - done


def test_what_a_killed_run_did_is_in_the_totals_of_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def killed(*args: Any) -> None:  # nothing that a run does at its end is done
        raise Killed

    source, output = jsonl(tmp_path / "m.jsonl", [{"prompt": "Hello."}, {"prompt": "Bye."}]), tmp_path / "out"
    monkeypatch.setattr("pipeline.execution.prepare._NOTE_EVERY_S", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("jobs.caption.finish", killed)
        patch.setattr(CaptionJob, "close", lambda job, state: None)
        caption(source, output)
    record = json.loads((output / "__run" / "run.json").read_text())
    assert (record["state"], record["totals"]["runs"], record["totals"]["rows"]) == ("running", 1, 2)
    assert caption(source, output) == 0
    record = json.loads((output / "__run" / "run.json").read_text())
    assert (record["state"], record["totals"]["runs"], record["totals"]["rows"]) == ("finished", 2, 2)


def test_another_model_at_the_same_path_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, source, output = tmp_path / "model", jsonl(tmp_path / "m.jsonl", [{"prompt": "Hello."}]), tmp_path / "out"
    shutil.copytree(CHECKPOINT, model)
    words = ("--model.path", str(model))
    assert caption(source, output, *words) == 0
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# other #}")
    assert caption(source, output, *words) == 2
    assert f"{model}: chat_template.jinja: was " in capsys.readouterr().err
    record = json.loads((output / "__run" / "run.json").read_text())
    del record["identity"]["model.files"], record["manifest"]["versions"]  # as earlier versions wrote it
    (output / "__run" / "run.json").write_text(json.dumps(record))
    assert caption(source, output, *words) == 0
    assert "is finished" in capsys.readouterr().out


def test_changed_settings_and_rows_are_refused_with_the_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    jsonl(folder / "a.jsonl", [{"prompt": "Hello."}])
    assert caption(folder, output) == 0
    assert caption(folder, output, "--sampling.temperature", "0.5") == 2
    assert "sampling.temperature: was 0.0, is 0.5" in capsys.readouterr().err
    jsonl(folder / "0.jsonl", [{"prompt": "New."}, {"prompt": "Newer."}])
    assert caption(folder, output) == 2
    assert "0.jsonl is new (2 rows)" in capsys.readouterr().err
    jsonl(folder / "a.jsonl", [{"prompt": "Jello."}])
    assert caption(folder, output, "--on-change=new-rows") == 2
    assert "a.jsonl has other content, with as many bytes and rows" in capsys.readouterr().err
    jsonl(folder / "a.jsonl", [{"prompt": "Hello."}])  # back again, at another time
    assert caption(folder, output, "--on-change=new-rows") == 0
    assert [(row["manifest_file"], row["manifest_row"]) for row in results(output)] == [(0, 0), (1, 0), (1, 1)]


def test_a_manifest_replaced_while_the_job_runs_ends_it_and_the_old_one_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, start = tmp_path / "m.parquet", tmp_path / "out", CaptionJob.start

    def write(*prompts: str) -> None:
        pq.write_table(pa.table({"prompt": prompts}), tmp_path / "new")
        os.replace(tmp_path / "new", source)

    def replaced(job: CaptionJob, placement: Placement) -> None:  # between opening the manifest and reading its rows
        write("1", "2", "3")
        start(job, placement)

    write("a", "b")
    with monkeypatch.context() as patch:
        patch.setattr(CaptionJob, "start", replaced)
        assert caption(source, output) == 2
    assert "it was changed in the meantime; run the job again" in capsys.readouterr().err
    assert not (output / "_SUCCESS").exists()
    write("a", "b")
    assert caption(source, output) == 0
    assert [row["status"] for row in results(output)] == ["ok", "ok"]


def test_too_many_errors_stop_the_job_and_keep_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": f"{i}.png", "prompt": "?"} for i in range(3)] + [{"prompt": "Hello."}]
    source, output = jsonl(tmp_path / "m.jsonl", rows), tmp_path / "out"
    assert caption(source, output, "--run.max_error_fraction", "0.5") == 3
    message = capsys.readouterr().err
    assert "3 of 4 rows failed (75%), more than run.max_error_fraction 0.5 allows:\n  3 MediaNotFound, as row 0:0" in (
        message
    )
    assert not (output / "_SUCCESS").exists()
    assert caption(source, output, "--run.max_error_fraction", "0.8") == 0
    assert len(results(output)) == 4


def test_a_run_without_an_answer_has_its_own_exit_code_and_a_larger_limit_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "m.jsonl", [{"image": "none.png", "prompt": "?"}, {"prompt": "Hello."}])
    assert caption(source, tmp_path / "out", "--input.limit", "1") == 4
    printed = capfd.readouterr().out
    assert "EVERY ROW FAILED" in printed and "none.png" in printed and "--retry-failed" in printed
    assert len(results(tmp_path / "out")) == 1
    assert caption(source, tmp_path / "out", "--input.limit", "1") == 4, "also where there is nothing left to do"
    assert caption(source, tmp_path / "out") == 0
    assert [row["status"] for row in results(tmp_path / "out")] == ["error", "ok"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.path", "./no-such-model"], "no model folder at ./no-such-model"),
        (["--input.path", "no-such-manifest.parquet"], "no-such-manifest.parquet"),
        (["--sampling.top_p", "7"], "sampling.top_p: found '7'"),
        (["--input.keep", "nope"], "no column 'nope'"),
        (["--input.keep", "tags", "--output.partition_by", "tags"], "tags is list<item: string>, whose values can't"),
        (["--prompt.template", "{nope}"], "nope"),
        (["--config", "no-such-config.yaml"], "can't read the config no-such-config.yaml"),
    ],
)
def test_what_is_broken_stops_the_job_before_ray_starts(tmp_path: Path, words: list[str], expected: str) -> None:
    source = jsonl(tmp_path / "m.jsonl", [{"question": "Hello.", "tags": ["a"]}])
    command = [sys.executable, "-m", "jobs.caption", "--input.path", str(source), "--output.path", str(tmp_path / "o")]
    command += ["--model.path", "demo", "--prompt.template", "{question}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "o" / "__run" / "log.txt").exists()


def test_a_manifest_without_usable_columns_names_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "m.jsonl", [{"question": "Hello.", "photo": "a.png"}])
    assert caption(source, tmp_path / "o") == 2
    message = capsys.readouterr().err
    assert "question" in message
    assert "photo" in message
    assert "input.columns" in message


def test_a_profile_traces_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    rows = [{"prompt": f"Name {number} colours."} for number in range(3)]
    output = tmp_path / "out"
    more = ("--profile", "4", "--sampling.ignore_eos", "true")
    assert caption(jsonl(tmp_path / "rows.jsonl", rows), output, *more, max_tokens=24) == 0
    trace = json.loads(gzip.decompress((output / "__run" / "profile" / "engine-0.json.gz").read_bytes()))
    steps = [event for event in trace["traceEvents"] if event["name"] == "engine step" and event.get("ph") == "X"]
    assert len(steps) == 4
    named = {event["name"] for event in trace["traceEvents"]}
    products = {name for name in named if "mm" in name or "_linear" in name}  # plain, and packed
    assert products and any("attention" in name for name in named), sorted(named)[:50]
    timeline = json.loads(gzip.decompress((output / "__run" / "profile" / "ray.json.gz").read_bytes()))
    assert any("EngineActor" in event["cat"] for event in timeline)


@pytest.mark.slow
def test_a_stopped_run_leaves_a_folder_that_the_next_one_finishes(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": f"Say {i}.", "max_tokens": 40} for i in range(400)]
    source, output = jsonl(tmp_path / "m.jsonl", rows), tmp_path / "out"
    command = [sys.executable, "-m", "jobs.caption", "--input.path", str(source), "--output.path", str(output)]
    command += ["--model.path", "demo", "--output.seconds_per_fragment", "0.1", "--sampling.ignore_eos", "true"]
    command += ["--resources.num_cpus", "2", "--engine.max_running", "4"]
    command += ["--input.settings", SETTINGS, "--input.allow_missing_media", "true"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["STOPPED_RUN"] = str(tmp_path)  # which all of its processes inherit
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, **streams, text=True, env=environment)
    deadline = time.monotonic() + 900
    while not list((output / "__run" / "fragments").glob("*.parquet")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.05)
    impatient = [signal.SIGINT] * 100  # not SIGTERM, whose handler Ray's core takes away for some ms while it ends
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, *impatient):  # a scheduler and a user
        process.send_signal(number)  # does nothing once the process has ended
        time.sleep(0.3 if process.poll() is None else 0)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 130, printed
    assert "the same command resumes" in printed and "Traceback" not in printed
    deadline = time.monotonic() + 30  # workers notice the end of their raylet by looking for it now and then
    while (left := _processes_with(f"STOPPED_RUN={tmp_path}")) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []
    record = json.loads((output / "__run" / "run.json").read_text())
    assert record["state"] == "interrupted"
    assert 0 < record["counts"]["done"] < 400
    assert not (output / "_SUCCESS").exists()
    assert caption(source, output, "--sampling.ignore_eos", "true", max_tokens=128) == 0
    assert [row["id"] for row in results(output)] == [str(i) for i in range(400)]
    record = json.loads((output / "__run" / "run.json").read_text())
    assert record["num_runs"] == 2
    assert record["counts"]["this_run"] < 400


def _processes_with(variable: str) -> list[str]:
    """Commands of the processes that have this in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cpus", [1, 2])
def test_the_demo_is_answered_right_on_one_cpu_and_on_two(tmp_path: Path, cpus: int) -> None:
    write_demo_world(tmp_path / "world", rows_per_task=20)
    command = [sys.executable, "-m", "jobs.caption", "--config", "configs/demo.yaml"]
    command += ["--input.path", str(tmp_path / "world"), "--output.path", str(tmp_path / "out")]
    command += ["--resources.num_cpus", str(cpus)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr
    problems, scores = check(tmp_path / "out", 0.95)
    assert problems == []
    assert sum(rows for _, rows in scores.values()) == 140


def test_the_demo_checkpoint_is_named_in_the_run_s_record(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "m.jsonl", [{"prompt": "Hello."}])
    assert caption(source, tmp_path / "o") == 0
    record = json.loads((tmp_path / "o" / "__run" / "run.json").read_text())
    asked = {
        "family": "qwen2_vl", "video_prompt": "one run", "text_positions": "largest so far + 1", "thinks": False,
    }  # fmt: skip
    assert record["model"].items() >= {"path": str(CHECKPOINT), "revision": None, **asked}.items()
    assert record["versions"]["torch"]
    assert record["identity"]["sampling.max_tokens"] == 8
