"""The report's parts: one pass over the rows, facts of run.json, thumbnails, the command."""

from __future__ import annotations

import base64
import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.report import main
from pipeline.report.collect import CountHistogram, SecondsHistogram, Top, collect
from pipeline.report.facts import headline, rates, settings_lines, shown_source, speed, without_secrets
from pipeline.report.gallery import _message_text
from pipeline.report.thumbnails import ThumbnailMaker
from pipeline.results.reader import RunReader
from tests.unit.report.runs import RUN, make_image, medium, result_row, write_run, write_scores, write_video


def test_the_texts_of_a_chat_are_shown_and_what_is_no_chat_as_it_is() -> None:
    turns = '[{"role": "user", "content": [{"type": "image"}, {"text": "What?"}]}, {"role": "user", "content": "x"}]'
    assert _message_text(turns) == "What?\nx"
    for other in ("Why?", "[" * 200_000):
        assert _message_text(other) == other


def test_histograms_of_counts_are_exact() -> None:
    values = np.random.default_rng(0).integers(3, 900, 5_000)
    histogram = CountHistogram()
    for part in np.array_split(values, 7):
        histogram.add(part)
    assert histogram.quantile(0.5) == int(np.quantile(values, 0.5, method="inverted_cdf"))
    assert (histogram.largest, histogram.total) == (int(values.max()), int(values.sum()))
    bins = histogram.bins(40)
    assert len(bins) <= 41
    assert [rows for first, last, rows in bins] == [
        int(((values >= first) & (values <= last)).sum()) for first, last, _ in bins
    ]


def test_quantiles_of_seconds_are_right_to_two_per_cent() -> None:
    values = np.random.default_rng(1).lognormal(0, 2, 20_000)
    histogram = SecondsHistogram()
    histogram.add(values)
    assert histogram.quantile(0.95) == pytest.approx(np.quantile(values, 0.95), rel=0.02)


def test_the_top_rows_are_those_of_a_full_sort_whatever_the_batches() -> None:
    keys = np.random.default_rng(2).permutation(1_000).astype(float)
    keys[::7] = np.nan
    top = Top(5, np.random.default_rng(0))
    for part in np.array_split(np.arange(1_000), 13):
        top.add(keys[part], part[0])
    best = np.argsort(np.nan_to_num(keys, nan=-1))[::-1][:5]
    assert top.rows == best.tolist()


def test_one_pass_reads_rows_in_bounded_batches_and_fetches_only_what_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [result_row(number) for number in range(50)])
    reader = RunReader(str(folder))
    found = collect(reader, size=3)
    assert found.num_rows == 50 and found.output_tokens.total == sum(5 + number % 23 for number in range(50))
    row = reader.fetch({45})[45]
    assert row["id"] == "row-0045" and "logprobs" not in row


def test_kept_columns_with_whole_files_are_not_loaded_for_the_page(tmp_path: Path) -> None:
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kept = pa.schema([("prompt", pa.string()), ("pictures", pa.list_(picture)), ("picture", picture)])
    row = result_row(0) | {"pictures": [{"bytes": b"x", "path": None}], "picture": {"bytes": b"x", "path": None}}
    folder = write_run(tmp_path / "run", [row, row | {"manifest_row": 1}], kept=kept)
    shown = RunReader(str(folder)).fetch({0})[0]
    assert shown["prompt"] and not {"pictures", "picture"} & set(shown)


def test_a_run_whose_references_are_bytes_is_scored_and_shown(tmp_path: Path) -> None:
    kept = pa.schema([("prompt", pa.string()), ("reference", pa.binary()), ("task", pa.binary())])
    rows = [result_row(number) for number in range(6)]
    for row in rows:
        row |= {name: row[name].encode() for name in ("reference", "task")}
    folder = write_run(tmp_path / "run", rows, kept=kept)
    metrics = write_scores(folder)
    assert metrics["overall"]["exact_match"]["value"] == 1.0
    assert {one["value"] for one in metrics["slices"]["task"]} == {"colour", "count", "caption", "video"}
    assert main(["--no-thumbnails", str(folder)]) == 0


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_content_of_run_json_can_be_shown(data: st.DataObject) -> None:
    """Any value, at any depth of a real record, in place of what belongs there."""
    run: Any = copy.deepcopy(RUN)
    node, keys = run, sorted(run)
    while True:
        key = data.draw(st.sampled_from(keys))
        inner = node[key]
        keys = sorted(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
        if not keys or data.draw(st.booleans()):
            break
        node = inner
    node[key] = data.draw(_JSON)
    headline(run)
    speed(run, price_per_gpu_hour=2.0)
    list(settings_lines(run))


def test_the_headline_says_of_which_family_the_model_is_and_when_it_thinks() -> None:
    for thinks, said in ((True, "qwen3, thinks before it answers"), (False, "qwen3")):
        assert ("Model", said) in headline({"model": {"path": "qwen3", "thinks": thinks}})
    fine_tune = {"path": "/models/mine", "family": "qwen2_5_vl", "revision": "v2"}
    assert ("Model", "/models/mine, Qwen2.5-VL, revision v2") in headline({"model": fine_tune})


def test_rates_follow_the_pace_and_skip_lines_without_the_count() -> None:
    progress = [{"t": 10.0 + second, "rows": 5 * second + 20 * max(second - 50, 0)} for second in range(101)]
    points = rates([*progress, {"t": 200.0}], "rows", max_points=10)
    assert len(points) <= 11
    assert points[0][1] == pytest.approx(5) and points[-1][1] == pytest.approx(25)
    assert rates(progress, "output_tokens") == []


def test_sources_are_shown_without_secrets_and_shortened() -> None:
    assert shown_source("https://me:pw@host/a.png?X-Amz-Signature=1") == "https://host/a.png?…"
    assert shown_source("data:image/png;base64,AAAA") == "data:image/png;base64,…"
    assert shown_source("photos/what?.png") == "photos/what?.png"
    assert without_secrets("GET s3://k:s@bucket/x failed") == "GET s3://bucket/x failed"


def test_settings_hide_what_looks_like_a_secret_and_nothing_else() -> None:
    values = {
        "sampling": {"max_tokens": 5, "stop_token_ids": [1]},
        "input": {"storage_options": {"secret": "s3cr3t", "endpoint_url": "http://x", "client_kwargs": {"a": "deep"}}},
        "hub": {"api_key": "k3y", "token": ""},
    }
    shown = dict(settings_lines(values))
    assert shown["sampling.max_tokens"] == "5" and shown["sampling.stop_token_ids"] == "1"
    assert shown["input.storage_options.endpoint_url"] == "http://x"
    assert not {"s3cr3t", "k3y", "deep"} & set(shown.values())


def _row(*media: dict[str, Any], row: int = 0) -> dict[str, Any]:
    return {"media": list(media), "manifest_file": 0, "manifest_row": row}


def _size(picture: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "JPEG"
        return image.size


def test_thumbnails_are_made_of_files_urls_and_videos_or_give_a_reason(tmp_path: Path) -> None:
    make_image(tmp_path / "tall.png", 3)
    encoded = base64.b64encode((tmp_path / "tall.png").read_bytes()).decode()
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + b"x" * 50)
    write_video(tmp_path / "clip.mp4")
    run = {"manifest": {"path": str(tmp_path / "rows.parquet")}}
    with ThumbnailMaker(run) as maker:
        tall, url = maker.thumbnails(
            _row(medium("image", "tall.png"), medium("image", f"data:image/png;base64,{encoded}"))
        )
        film, broken = maker.thumbnails(_row(medium("video", "clip.mp4"), medium("image", "broken.jpg")))
        gone, remote = maker.thumbnails(_row(medium("image", "gone.png"), medium("image", "https://host/a.png")))
    assert tall.pictures == url.pictures and _size(tall.pictures[0]) == (240, 240)
    assert [_size(picture) for picture in film.pictures] == [(160, 120)] * 4
    assert broken.missing == "can't be decoded (UnsupportedMedia)"
    assert gone.missing == remote.missing == "not on this machine"


def test_paths_of_a_manifest_of_many_folders_begin_where_the_run_s_did(tmp_path: Path) -> None:
    (tmp_path / "day1").mkdir()
    make_image(tmp_path / "day1" / "tall.png", 3)
    with ThumbnailMaker({"manifest": {"path": str(tmp_path / "*" / "rows.parquet")}}) as maker:
        (shown,) = maker.thumbnails(_row(medium("image", "day1/tall.png")))
    assert shown.pictures


def test_brackets_in_a_folder_s_name_are_no_pattern(tmp_path: Path) -> None:
    (folder := tmp_path / "set [2024]").mkdir()
    make_image(folder / "tall.png", 3)
    for path in (folder, folder / "rows.parquet"):
        (folder / "rows.parquet").touch()
        with ThumbnailMaker({"manifest": {"path": str(path)}}) as maker:
            (shown,) = maker.thumbnails(_row(medium("image", "tall.png")))
        assert shown.pictures


def test_embedded_images_are_read_from_the_manifest_by_row_key(tmp_path: Path) -> None:
    files = [Path(make_image(tmp_path / f"{number}.png", number)).read_bytes() for number in range(4)]
    column = [[{"bytes": data, "path": "0.png"}] for data in files]
    pq.write_table(pa.table({"pics": column}), tmp_path / "rows.parquet", row_group_size=2)
    manifest = {"path": str(tmp_path / "rows.parquet"), "fingerprint": {"files": [["rows.parquet", 1, 4]]}}
    run = {"manifest": manifest, "config": {"input": {"columns": {"images": "pics"}}}}
    with ThumbnailMaker(run) as maker:
        names = {3: "0.png", 0: "0.png", 9: "bytes"}
        shown = [maker.thumbnails(_row(medium("image", name), row=row))[0] for row, name in names.items()]
    assert [len(one.pictures) for one in shown] == [1, 1, 0]
    assert shown[0].pictures != shown[1].pictures
    assert shown[2].missing == "inside the manifest, which can't be read from here"


def test_no_more_pictures_are_made_once_their_bytes_are_used_up(tmp_path: Path) -> None:
    path = make_image(tmp_path / "a.png", 1)
    with ThumbnailMaker({}, max_bytes=1) as maker:
        first, second = (maker.thumbnails(_row(medium("image", path)))[0] for _ in range(2))
    assert first.pictures and second.missing == "left out to keep the page small"


def test_the_command_writes_a_page_prints_markdown_and_refuses_other_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", [result_row(number) for number in range(4)])
    assert main([str(folder), "--no-thumbnails"]) == 0
    assert (folder / "_report.html").read_text().startswith("<!doctype html>")
    assert main([str(folder), "--format", "markdown"]) == 0
    assert "4 rows, no errors" in capsys.readouterr().out
    elsewhere = tmp_path / "new" / "page.html"
    assert main([str(folder), "--output", str(elsewhere), "--no-thumbnails"]) == 0 and elsewhere.exists()
    for path in (f"{tmp_path}", f"{tmp_path}/", f"{tmp_path}/later/"):
        assert main([str(folder), "--output", path, "--no-thumbnails"]) == 2
        example = f"{path.rstrip('/')}/report.html"
        assert capsys.readouterr().err == f"error: can't write {path}: it is a folder; name a file, such as {example}\n"
    assert main([str(tmp_path / "new")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
