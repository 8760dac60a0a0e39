"""The plan against the run's own preprocessing: same rows, same errors, same counts, from a part of the bytes."""

from __future__ import annotations

import functools
import io
import itertools
import json
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipeline.planning.survey as survey_module
from jobs.plan import main
from pipeline.config import CaptionConfig
from pipeline.config_file import load_config
from pipeline.demo.manifest import write_demo_world
from pipeline.errors import ConfigError
from pipeline.execution.stages import Stages, open_stages
from pipeline.manifest.find import open_manifest
from pipeline.manifest.row_set import RowNumbering
from pipeline.manifest.work import read_work
from pipeline.planning.plan import Plan, PlanConfig, draw, make_plan
from pipeline.planning.sample import SampledRow
from pipeline.planning.survey import Survey
from pipeline.preprocess.header import MediumHeader
from pipeline.preprocess.stage import PreprocessStage
from tests.unit.preprocess.conftest import encode_image, encode_video

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

Overrides = dict[str, str]


def overrides_for(manifest: Path, **overrides: Any) -> Overrides:
    """A plan's settings; `section__key=value` sets `section.key`."""
    given = {name.replace("__", "."): str(value) for name, value in overrides.items()}
    ours = {
        "input.settings": "[max_pixels, min_pixels, fps, num_frames, start_s, end_s]",
        "input.allow_missing_media": "true",
        "model.path": "demo",
    }
    return {"input.path": str(manifest), "output.path": str(manifest.parent / "out"), **ours, **given}


def command_line(given: Overrides) -> list[str]:
    return [argument for name, value in given.items() for argument in (f"--{name}", value)]


def plan_of(given: Overrides) -> Plan:
    return make_plan(load_config(PlanConfig, None, given))


def preprocessed(given: Overrides) -> list[dict[str, Any]]:
    """Every row after the run's CPU stage."""
    return _preprocessed(tuple(given.items()))


@functools.cache
def _preprocessed(given: tuple[tuple[str, str], ...]) -> list[dict[str, Any]]:
    stages, tables = stages_and_tables(dict(given))
    stage = PreprocessStage(stages.preprocess)
    try:
        columns = ["manifest_row", "num_prompt_tokens", "num_visual_tokens", "error_type", "media"]
        return [row for table in tables for row in stage(table).select(columns).to_pylist()]
    finally:
        stage.close()


def stages_and_tables(given: Overrides) -> tuple[Stages, list[pa.Table]]:
    """A job's stages, and the rows of its manifest."""
    opened = open_stages(load_config(CaptionConfig, None, given))
    works, columns = opened.whole_manifest(), opened.stages.columns
    return opened.stages, [read_work(opened.manifest.spec, work, columns) for work in works]


def surveyed(given: Overrides) -> list[SampledRow]:
    """Every row after the plan's survey."""
    stages, tables = stages_and_tables(given)
    survey = Survey(stages.preprocess, max_context=4096)
    return [row for table in tables for row in survey.rows(table)]


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def demo_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_world(tmp_path_factory.mktemp("world"), rows_per_task=4)


def test_on_the_demo_world_every_count_is_that_of_the_run(demo_world: Path) -> None:
    given = overrides_for(demo_world, prompt__add_vision_id="true", prompt__template="Describe the image.")
    run, sampled, rows = preprocessed(given), surveyed(given), plan_of(given).rows
    for seen, planned in zip(run, sampled, strict=True):
        assert seen["error_type"] is None and planned.error is None
        assert planned.row_key == (0, seen["manifest_row"])
        assert planned.grids == tuple(tuple(medium["grid_thw"]) for medium in seen["media"])
        assert planned.num_prompt_tokens == seen["num_prompt_tokens"]
        assert planned.num_visual_tokens == seen["num_visual_tokens"]
    assert rows.is_exact and rows.num_rows == len(run) == rows.num_sampled
    assert rows.prompt_tokens.total.value == sum(row["num_prompt_tokens"] for row in run)
    assert rows.visual_tokens.total.value == sum(row["num_visual_tokens"] for row in run)
    assert sum(count.value for count in rows.kinds.values()) == len(run)
    assert set(rows.kinds) == {"text", "one image", "several images", "video", "images and videos"}
    assert rows.bad == ()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, photos: Path, clips: Path) -> Path:
    """Real photographs and clips with all that a row may set, among them rows that fail."""
    folder = tmp_path_factory.mktemp("mixed")
    for path in [photos / "rocket.jpg", photos / "coffee.png", photos / "retina.jpg", photos / "page.png"]:
        shutil.copy(path, folder)
    for path in clips.glob("*.mp4"):
        shutil.copy(path, folder)
    turned = Image.Exif()
    turned[0x0112] = 6
    with Image.open(photos / "rocket.jpg") as rocket:
        (folder / "turned.jpg").write_bytes(encode_image(rocket, "JPEG", exif=turned))
    (folder / "turned.mp4").write_bytes(encode_video(40, size=(320, 96), rotation=90))
    (folder / "film.webm").write_bytes(encode_video(75, size=(320, 192), codec="libvpx", container="webm"))
    (folder / "page.html.jpg").write_bytes(b"<html>not found</html>")
    (folder / "cut.mp4").write_bytes(encode_video(40)[:700])
    rows: list[dict[str, Any]] = [
        {"image": "rocket.jpg"},
        {"image": "turned.jpg", "max_pixels": 90_000},
        {"images": ["coffee.png", "retina.jpg", "page.png"]},
        {"image": "page.png", "min_pixels": 500_000},
        {"video": "bikes.mp4"},
        {"video": "bigbuckbunny.mp4", "num_frames": 8},
        {"video": "bikes.mp4", "start_s": 2.0, "end_s": 5.5, "fps": 4.0},
        {"video": "carphone_pristine.mp4", "max_pixels": 60_000},
        {"video": "turned.mp4"},
        {"video": "film.webm"},
        {"image": "coffee.png", "video": "carphone_distorted.mp4"},
        {"prompt": "No picture at all, only a question."},
        {"image": "page.html.jpg"},
        {"image": "missing.jpg"},
        {"image": "/etc/passwd"},
        {"video": "cut.mp4"},
        {"video": "bikes.mp4", "start_s": 60.0},
        {"image": "rocket.jpg", "fps": 2.0},
        {"prompt": "A reserved token: <|image_pad|>", "image": "rocket.jpg"},
        {"image": "rocket.jpg", "max_pixels": 3},
    ]
    return write_rows(folder, [{"prompt": "What is shown?", **row} for row in rows])


@pytest.mark.parametrize("overrides", [{}, {"media__max_visual_tokens": 400, "media__video_frames": "keyframes"}])
def test_on_real_media_counts_and_errors_are_those_of_the_run(mixed: Path, overrides: dict[str, Any]) -> None:
    given = overrides_for(mixed, **overrides)
    run, plan = preprocessed(given), surveyed(given)
    assert [row.error and type(row.error).__name__ for row in plan] == [row["error_type"] for row in run]
    assert {row["error_type"] for row in run} > {"UnsupportedMedia", "MediaNotFound", "AccessDenied", "SettingError"}
    answered = [(planned, seen) for planned, seen in zip(plan, run, strict=True) if not seen["error_type"]]
    assert len(answered) >= 11
    for planned, seen in answered:
        assert planned.num_visual_tokens == pytest.approx(seen["num_visual_tokens"], rel=0.1)
        assert planned.num_prompt_tokens == pytest.approx(seen["num_prompt_tokens"], rel=0.1)


def test_failing_rows_are_forecast_by_error_type_with_an_example(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = plan_of(overrides_for(mixed)).rows
    found = {bad.error_type: (bad.rows.value, bad.example_row_key) for bad in rows.bad}
    assert found["MediaNotFound"] == (1, (0, 13)) and found["AccessDenied"] == (1, (0, 14))
    assert found["SettingError"] == (3, (0, 16)) and rows.num_bad.value == 8
    code = main([*command_line(overrides_for(mixed)), "--plan.max_error_fraction", "0.3"])
    printed = capsys.readouterr().out
    assert code == 3
    assert "MediaNotFound" in printed and "missing.jpg" in printed and "--input.allow" in printed


def test_rows_that_do_not_fit_come_with_the_setting_that_helps(mixed: Path) -> None:
    plan = plan_of(overrides_for(mixed, sampling__max_tokens=3500))
    too_long = next(bad for bad in plan.rows.bad if bad.error_type == "PromptTooLong")
    assert "the model's context is 4096" in too_long.example_message
    (advice,) = [one.setting for one in plan.advice if "max_visual_tokens" in one.setting]
    budget = advice.rpartition(" ")[2]
    after = plan_of(overrides_for(mixed, sampling__max_tokens=3500, media__max_visual_tokens=budget))
    assert all(bad.error_type != "PromptTooLong" for bad in after.rows.bad)


def test_where_no_setting_helps_a_note_says_what_to_do(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path, [{"image": "missing.png", "prompt": "?"}] * 2)
    plan = plan_of(overrides_for(manifest))
    assert plan.notes[-1] == "100% of the rows will fail: fix them before the run"
    assert all(one.setting for one in plan.advice)


def test_a_small_cache_limits_the_length_of_rows(mixed: Path) -> None:
    plan = plan_of(overrides_for(mixed, engine__cache_gb=0.001, model__device="cpu"))
    assert plan.too_long_why == "the key-value cache" and plan.too_long_limit < 1000
    assert any("key-value cache holds" in bad.example_message for bad in plan.rows.bad)


def test_a_sample_is_spread_over_all_files_and_its_range_contains_the_truth(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(5):
        texts = ["word " * int(rng.integers(1, 60)) for _ in range(700)]
        pq.write_table(pa.table({"prompt": texts}), tmp_path / f"{number}.parquet", row_group_size=100)
    manifest = open_manifest(str(tmp_path), listing_path=str(tmp_path / "listing"))
    works = draw(manifest, RowNumbering([file.num_rows for file in manifest.files]), 256, 0)
    assert {work.file for work in works} == set(range(5))
    assert sum(work.num_rows for work in works) == 256
    spans = [(work.file, work.start, work.stop) for work in works]
    assert spans == sorted(spans) and all(a[2] <= b[1] for a, b in itertools.pairwise(spans) if a[0] == b[0])
    given = overrides_for(tmp_path / "*.parquet", plan__sample=256)
    plan, whole = plan_of(given), plan_of({**given, "plan.sample": "10000"})
    assert not plan.rows.is_exact and plan.rows.num_sampled == 256 and plan.rows.num_rows == 3500
    assert whole.rows.is_exact
    truth, total = whole.rows.prompt_tokens.total.value, plan.rows.prompt_tokens.total
    assert total.low < truth < total.high and total.high - total.low < 0.25 * truth
    assert plan_of(given) != plan_of({**given, "plan.seed": "1"})


def test_json_is_the_only_thing_on_stdout(demo_world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(CONFIGS / "demo.yaml"), "--input.path", str(demo_world), "--json", "--gpu", "8xH200"]
    assert main([*arguments, "--price-per-gpu-hour", "3.5", "--sample", "1000"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["rows"]["num_rows"] == 28 and plan["rows"]["is_exact"]
    (times,) = plan["times"]
    assert times["hardware"] == "8 x H200" and "not a measurement" in times["basis"]
    assert 0 < times["cost"]["low"] < times["cost"]["value"] < times["cost"]["high"]
    assert times["cost"]["value"] == pytest.approx(3.5 * times["gpu_hours"]["value"])


def test_nothing_is_written_to_the_output_for_a_folder_of_media(mixed: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "media"
    shutil.copytree(mixed.parent, folder, ignore=shutil.ignore_patterns("*.jsonl"))
    (folder / "deep").mkdir()
    (folder / "deep" / "notes.md").write_text("?")
    given = overrides_for(folder, output__path=tmp_path / "captions", prompt__template="Describe it.")
    assert main(command_line(given)) == 0
    assert not (tmp_path / "captions").exists()
    printed = capsys.readouterr().out
    assert "one image" in printed and "video" in printed and "visual tokens" in printed
    assert "left alone" in printed and "1 .md" in printed


def test_a_published_model_is_compared_on_several_gpus_and_a_too_large_one_is_sharded(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.planning.plan._local_gpu", lambda: None)
    given = overrides_for(mixed)
    small = plan_of(given)
    assert small.times == ()
    (why,) = [note for note in small.notes if "--probe" in note]
    assert why.startswith(
        "no forecast from data sheets: no GPU was named (--gpu) or found here, and the model has 2.8 million"
    )
    compared = plan_of({**given, "plan.shape": "7b"})
    names = ("H200", "H100", "A100", "L40S", "L4", "A10G")
    assert [times.hardware for times in compared.times] == [f"1 x {name}" for name in names]
    assert compared.times[0].seconds.value < compared.times[2].seconds.value
    large = plan_of({**given, "plan.shape": "72b", "plan.gpu": "H100"})
    assert "--resources.gpus_per_engine 3" in [one.setting for one in large.advice]
    with pytest.raises(ConfigError, match="'Z80' is not in the table"):
        plan_of({**given, "plan.gpu": "Z80"})


def test_a_source_that_hangs_fails_its_row_in_little_time(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_image(Image.new("RGB", (56, 56))))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/slow.jpg"
        manifest = write_rows(tmp_path, [{"image": "a.png"}, {"image": url}, {"image": "a.png"}])
        given = overrides_for(manifest, input__allow_private_hosts="true", input__fetch_timeout_s="0.3")
        started = time.monotonic()
        rows = plan_of({**given, "prompt.template": "?"}).rows
    assert [(bad.error_type, bad.rows.value) for bad in rows.bad] == [("FetchTimeout", 1)]
    assert rows.kinds["one image"].value == 3
    assert time.monotonic() - started < 60


def test_a_header_that_keeps_its_parser_busy_is_abandoned(demo_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, stuck = survey_module.read_header, []

    def read_header(*arguments: Any) -> MediumHeader:
        if not stuck:
            stuck.append(True)
            time.sleep(200)  # in a daemon thread
        return real(*arguments)

    monkeypatch.setattr(survey_module, "read_header", read_header)
    monkeypatch.setattr(survey_module, "_GRACE_S", 0.1)
    stages, (table, *_) = stages_and_tables(overrides_for(demo_world, prompt__template="?"))
    started = time.monotonic()
    rows = Survey(stages.preprocess, max_context=4096, threads=1, header_timeout_s=5.0).rows(table)
    assert [type(row.error).__name__ for row in rows if row.error] == ["MediaTimeout"]
    assert time.monotonic() - started < 150


def test_rows_not_begun_in_time_are_left_out(demo_world: Path) -> None:
    stages, (table, *_) = stages_and_tables(overrides_for(demo_world, prompt__template="?"))
    assert Survey(stages.preprocess, max_context=4096).rows(table, until=time.monotonic() - 1) == []


def test_a_probe_measures_both_stages_here(demo_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = overrides_for(demo_world, prompt__template="?", sampling__max_tokens=8, model__device="cpu")
    assert main([*command_line(given), "--probe", "--plan.probe_seconds", "2", "--json"]) == 0
    captured = capsys.readouterr()
    (times,) = json.loads(captured.out)["times"]
    assert times["basis"].startswith("measured here") and times["hardware"].startswith("this machine")
    assert 0 < times["seconds"]["low"] <= times["seconds"]["value"] <= times["seconds"]["high"]
    assert times["gpu_hours"] is None and "which both stages share" in times["bottleneck"]
    assert "warming up" in captured.err


@pytest.fixture
def bucket() -> Iterator[Any]:
    pytest.importorskip("s3fs", reason="pip install 'qwen2-vl-batch[s3]' to run this")
    from tests.servers.s3 import s3_server

    with s3_server() as server:
        server.make_bucket("data")
        yield server


def test_less_than_a_fifth_of_large_media_in_a_bucket_is_read(bucket: Any, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1500, 3), dtype=np.uint8)
    film = np.random.default_rng(0).integers(0, 256, (60, 240, 320, 3), dtype=np.uint8)
    media = {
        "photo.png": encode_image(Image.fromarray(noise)),
        "photo.bmp": encode_image(Image.fromarray(noise), "BMP"),
        "film.mp4": encode_video(film, options={"preset": "ultrafast", "crf": "10", "g": "10"}),
        "film.avi": encode_video(film, codec="mjpeg", container="avi", pix_fmt="yuvj420p"),
    }
    rows = [{"image" if "photo" in name else "video": name, "prompt": "?"} for name in media]
    table = pa.Table.from_pylist([{"image": None, "video": None, **row} for row in rows])
    sink = io.BytesIO()
    pq.write_table(table, sink)
    for name, body in {**media, "manifest.parquet": sink.getvalue()}.items():
        bucket.client().put_object(Bucket="data", Key=f"in/{name}", Body=body)
    given = {
        "input.path": "s3://data/in/manifest.parquet",
        "output.path": str(tmp_path / "out"),
        "model.path": "demo",
        "input.storage_options": json.dumps(bucket.storage_options),
    }
    bucket.bytes_sent = 0
    plan = plan_of(given)
    sizes = sum(map(len, media.values()))
    assert plan.rows.bad == () and plan.rows.media_bytes.value == sizes > 15_000_000
    assert bucket.bytes_sent < sizes / 5 and plan.bytes_read <= bucket.bytes_sent
    run = preprocessed(given)
    assert plan.rows.visual_tokens.total.value == sum(row["num_visual_tokens"] for row in run)
