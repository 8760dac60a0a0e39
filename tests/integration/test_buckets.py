"""Manifest, media and output in a bucket: the same promises, over a real HTTP endpoint that misbehaves."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.caption import main
from pipeline.demo import CHECKPOINT
from tests.servers.s3 import Fault, S3Server, s3_server

pytest.importorskip("s3fs", reason="pip install 'qwen2-vl-batch[s3]' to run these")
pytestmark = pytest.mark.usefixtures("ray_with_two_cpus")


@pytest.fixture
def bucket() -> Iterator[S3Server]:
    with s3_server() as server:
        server.make_bucket("data")
        yield server


def put(server: S3Server, key: str, body: bytes) -> None:
    server.client().put_object(Bucket="data", Key=key, Body=body)


def keys(server: S3Server, prefix: str) -> list[str]:
    listed = server.client().list_objects_v2(Bucket="data", Prefix=prefix)
    return [entry["Key"] for entry in listed.get("Contents", [])]


def rows_of(server: S3Server, prefix: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for key in sorted(key for key in keys(server, prefix) if "/part-" in key):
        body = server.client().get_object(Bucket="data", Key=key)["Body"].read()
        rows += pq.read_table(io.BytesIO(body)).to_pylist()
    return rows


def caption(server: S3Server, *words: str) -> int:
    options = json.dumps(server.storage_options)
    return main(
        [
            *(
                "--input.path",
                "s3://data/in/manifest.parquet",
                "--output.path",
                "s3://data/out",
                "--model.path",
                "demo",
            ),
            *("--input.storage_options", options, "--output.storage_options", options, "--sampling.max_tokens", "4"),
            *("--input.allow_missing_media", "true"),
            *("--output.rows_per_fragment", "3", "--output.rows_per_part", "4", *words),
        ]
    )


def fill(server: S3Server, photos: Path) -> None:
    put(server, "in/photos/a.jpg", (photos / "rocket.jpg").read_bytes())
    put(server, "in/photos/b.png", (photos / "coffee.png").read_bytes())
    images = [
        "photos/a.jpg",
        "s3://data/in/photos/b.png",
        "photos/missing.jpg",
        "s3://other/secret.png",
        None,
        "photos/a.jpg",
    ]
    table = pa.table({"image": images, "prompt": ["?"] * 6})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    put(server, "in/manifest.parquet", sink.getvalue())


def test_a_job_lives_in_a_bucket_that_throttles_delays_and_cuts_connections(bucket: S3Server, photos: Path) -> None:
    fill(bucket, photos)
    bucket.faults += [
        Fault(503, method="GET"),
        Fault(500, code="InternalError", method="PUT"),
        Fault(delay_s=1.0, method="GET"),
        Fault(cut_after=100, method="GET"),
        Fault(503, method="PUT"),
    ]
    assert caption(bucket) == 0
    assert bucket.faults == [], "every fault was met"
    rows = rows_of(bucket, "out/")
    assert [row["manifest_row"] for row in rows] == list(range(6))
    assert [row["error_type"] for row in rows] == [None, None, "MediaNotFound", "AccessDenied", None, None]
    found = keys(bucket, "out/")
    assert sorted(found) == [
        "out/_SUCCESS",
        "out/__run/errors.jsonl",
        "out/__run/log.txt",
        "out/__run/progress.jsonl",
        "out/__run/run.json",
        "out/_report.html",
        "out/part-00000.parquet",
        "out/part-00001.parquet",
    ]
    record = json.loads(bucket.client().get_object(Bucket="data", Key="out/__run/run.json")["Body"].read())
    for section in ("input", "output"):
        options = record["config"][section]["storage_options"]
        assert options and set(options.values()) == {"(not recorded)"}
    assert record["state"] == "finished"


@pytest.mark.slow
def test_credentials_that_expire_half_way_stop_the_job_and_the_next_run_finishes(
    bucket: S3Server, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(bucket, photos)

    # The lease and run.json are written first; let those through, and nothing from the first fragment on.
    class FromFragments(Fault):
        begun = False

        def concerns(self, environ: dict[str, Any]) -> bool:
            FromFragments.begun |= "/fragments/" in environ["PATH_INFO"] and environ["REQUEST_METHOD"] == "PUT"
            return self.begun and super().concerns(environ)

    bucket.faults[:] = [FromFragments(400, code="ExpiredToken", path="/expired", lasting=True)]
    # The servers of one process share their buckets: a folder of its own, not the one of the test above.
    output = ("--output.path", "s3://data/expired")
    assert caption(bucket, *output) == 2
    told = capfd.readouterr().err
    assert "can't write s3://data/expired/__run/fragments/" in told
    assert "the credentials were refused (ExpiredToken: ExpiredToken, injected): renew them and run the same" in told
    assert "Traceback" not in told
    assert not any("part-" in key or "_SUCCESS" in key for key in keys(bucket, "expired/"))
    bucket.faults.clear()
    assert caption(bucket, *output) == 0
    assert [row["manifest_row"] for row in rows_of(bucket, "expired/")] == list(range(6))


def test_credentials_for_the_media_that_expire_half_way_stop_the_job_and_mark_no_row(
    bucket: S3Server, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rows are marked for what is wrong with them, and nothing is."""
    names = [f"{half}/{number}.jpg" for half in ("early", "late") for number in range(6)]
    for name in names:
        put(bucket, f"media/{name}", (photos / "rocket.jpg").read_bytes())
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": names, "prompt": ["?"] * len(names)}), sink)
    put(bucket, "media/manifest.parquet", sink.getvalue())
    words = ("--input.path", "s3://data/media/manifest.parquet", "--output.path", "s3://data/captions")
    words += ("--resources.max_rows_per_unit", "2", "--resources.min_rows_per_unit", "1")
    bucket.faults[:] = [Fault(400, code="ExpiredToken", method="GET", path="/media/late/", lasting=True)]
    assert caption(bucket, *words) == 2
    told = capfd.readouterr().err.splitlines()[-1]  # whatever Ray may have written before it, and no more behind it
    assert told.startswith("error: s3://data/media/late/")
    assert "the credentials were refused (ExpiredToken: ExpiredToken, injected): renew them and run the same" in told
    assert any("/media/early/" in request for request in bucket.requests)
    for key in keys(bucket, "captions/__run/fragments/"):
        body = bucket.client().get_object(Bucket="data", Key=key)["Body"].read()
        assert set(pq.read_table(io.BytesIO(body)).column("status").to_pylist()) == {"ok"}
    assert "captions/_SUCCESS" not in keys(bucket, "captions/")
    bucket.faults.clear()
    assert caption(bucket, *words) == 0
    rows = rows_of(bucket, "captions/")
    assert [(row["manifest_row"], row["status"]) for row in rows] == [(number, "ok") for number in range(12)]


def test_a_checkpoint_in_a_bucket_is_used_like_a_folder(bucket: S3Server, tmp_path: Path) -> None:
    for path in CHECKPOINT.iterdir():
        put(bucket, f"models/demo/{path.name}", path.read_bytes())
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Name a colour."}')
    bucket.requests.clear()
    words = {
        "input.path": str(tmp_path / "rows.jsonl"),
        "output.path": str(tmp_path / "out"),
        "model.path": "s3://data/models/demo",
        "model.cache_dir": str(tmp_path / "cache"),
        "model.storage_options": json.dumps(bucket.storage_options),
        "sampling.max_tokens": "4",
    }
    assert main([word for key, value in words.items() for word in (f"--{key}", value)]) == 0
    (row,) = pq.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    assert row["status"] == "ok"
    fetched = [request for request in bucket.requests if request.startswith("GET") and "safetensors" in request]
    assert len(fetched) == 1
    record = (tmp_path / "out" / "__run" / "run.json").read_text()
    assert json.loads(record)["model"]["path"] == "s3://data/models/demo"
    assert "(not recorded)" in record
