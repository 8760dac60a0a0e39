"""Manifest, media and output in Google Cloud Storage's form, over HTTP against an emulator on this machine."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.caption import main
from pipeline import storage

pytest.importorskip("gcsfs", reason="pip install 'qwen2-vl-batch[gcs]' to run these")
emulator = pytest.importorskip("gcp_storage_emulator.server", reason="pip install gcp-storage-emulator to run these")


@pytest.fixture(scope="module")
def options() -> Iterator[dict[str, Any]]:
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="data")
    server.start()
    yield {"token": "anon", "endpoint_url": f"http://127.0.0.1:{server._api._httpd.server_port}"}
    server.stop()


def test_files_are_published_listed_read_in_parts_and_deleted(options: dict[str, Any]) -> None:
    root = f"gs://data/{uuid.uuid4().hex}"
    storage.publish(f"{root}/a/b.txt", b"0123456789", options)
    storage.publish(f"{root}/c.bin", bytes(9_000_000), options)
    assert [(info.path, info.size) for info in storage.list_files(root, options)] == [
        (f"{root}/a/b.txt", 10),
        (f"{root}/c.bin", 9_000_000),
    ]
    with storage.open_input(f"{root}/a/b.txt", options, random_access=True) as file:
        file.seek(4)
        assert file.read(3) == b"456"
    before = storage.file_info(f"{root}/a/b.txt", options).version
    storage.publish(f"{root}/a/b.txt", b"other", options)
    assert storage.file_info(f"{root}/a/b.txt", options).version != before
    storage.delete(root, options, recursive=True)
    assert not storage.exists(f"{root}/c.bin", options) and not storage.exists(f"{root}/a/b.txt", options)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{root}/c.bin", options)


@pytest.mark.usefixtures("ray_with_two_cpus")
def test_a_job_reads_and_writes_its_bucket(options: dict[str, Any], photos: Path) -> None:
    root = f"gs://data/{uuid.uuid4().hex}"
    storage.publish(f"{root}/in/photos/a.png", (photos / "coffee.png").read_bytes(), options)
    images = ["photos/a.png", "photos/missing.jpg", f"{root}/in/photos/a.png"]
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": images, "prompt": ["?"] * 3}), sink)
    storage.publish(f"{root}/in/manifest.parquet", sink.getvalue(), options)
    words = ["--input.path", f"{root}/in/manifest.parquet", "--output.path", f"{root}/out", "--model.path", "demo"]
    words += ["--input.storage_options", json.dumps(options), "--output.storage_options", json.dumps(options)]
    assert main([*words, "--sampling.max_tokens", "4"]) == 0
    table = pq.read_table(io.BytesIO(storage.read_bytes(f"{root}/out/part-00000.parquet", options)))
    assert table.column("error_type").to_pylist() == [None, "MediaNotFound", None]
    names = {info.path.rpartition("/")[2] for info in storage.list_files(f"{root}/out", options)}
    assert {"_SUCCESS", "run.json", "part-00000.parquet", "_report.html"} <= names
