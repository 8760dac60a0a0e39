"""The same behaviour on a real S3 endpoint, with throttling and lost connections."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest.find import open_manifest
from pipeline.preprocess.fetch.source import Fetcher
from pipeline.preprocess.limits import FetchOptions
from tests.unit.manifest.manifests import rows_of, write_rows


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    pytest.importorskip("s3fs")
    from tests.servers.s3 import s3_server

    with s3_server() as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture
def bucket(s3: Any) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """The server, an empty prefix in its bucket, and the options that reach it."""
    yield s3, f"s3://bucket/{uuid.uuid4().hex}", s3.storage_options
    s3.faults.clear()
    s3.requests.clear()


def test_s3_files_are_published_in_one_put_and_listed_with_etags(bucket: tuple[Any, str, dict[str, Any]]) -> None:
    server, root, options = bucket
    server.requests.clear()
    storage.publish(f"{root}/a/part-0.parquet", b"x" * 100_000, options)
    assert [request.split()[0] for request in server.requests].count("PUT") == 1
    storage.publish(f"{root}/a/.hidden", b"x", options)
    storage.publish(f"{root}/b.txt", b"xy", options)
    server.client().put_object(Bucket="bucket", Key=f"{root.removeprefix('s3://bucket/')}/folder-marker/", Body=b"")
    found = storage.list_files(root, options)
    assert [(info.path, info.size) for info in found] == [(f"{root}/a/part-0.parquet", 100_000), (f"{root}/b.txt", 2)]
    assert [storage.file_info(info.path, options) for info in found] == found
    assert [info.path for info in storage.glob(f"{root}/*/part-?.parquet", options)] == [found[0].path]
    assert storage.is_dir(root, options) and storage.is_dir(f"{root}/", options)
    assert not storage.exists(f"{root}/nothing", options)
    storage.delete(found[1].path, options)
    storage.delete(found[1].path, options)
    assert not storage.exists(found[1].path, options)
    storage.delete(root, options, recursive=True)
    assert storage.list_files(root, options) == []


def test_s3_a_large_file_appears_whole(bucket: tuple[Any, str, dict[str, Any]], tmp_path: Path) -> None:
    _, root, options = bucket
    content = os.urandom(12_000_000)
    (tmp_path / "local").write_bytes(content)
    storage.publish_file(tmp_path / "local", f"{root}/copy", options)
    assert storage.read_bytes(f"{root}/copy", options) == content


def test_s3_throttling_and_lost_connections_are_survived(bucket: tuple[Any, str, dict[str, Any]]) -> None:
    from tests.servers.s3 import Fault

    server, root, options = bucket
    content = os.urandom(3_000_000)
    server.faults += [Fault(503, method="PUT"), Fault(500, "InternalError", method="PUT")]
    storage.publish(f"{root}/file", content, options)
    server.faults += [Fault(503, method="GET")]
    assert len(storage.list_files(root, options)) == 1
    for random_access in (False, True):
        server.faults += [Fault(cut_after=1_000_000, method="GET"), Fault(503, method="GET"), Fault(delay_s=0.3)]
        with storage.open_input(f"{root}/file", options, random_access=random_access) as file:
            assert file.read(10) + file.read() == content
    server.faults += [Fault(503, method="HEAD")]
    assert storage.exists(f"{root}/file", options), "a busy bucket is no missing file"


def test_s3_expired_and_refused_credentials_stop_at_once(bucket: tuple[Any, str, dict[str, Any]]) -> None:
    from tests.servers.s3 import Fault

    server, root, options = bucket
    for fault in (Fault(400, "ExpiredToken"), Fault(403, "AccessDenied")):
        server.requests.clear()
        server.faults.append(fault)
        with pytest.raises(OSError, match=fault.code):
            storage.publish(f"{root}/file", b"x", options)
        assert len(server.requests) == 1


def test_s3_a_parquet_manifest_is_opened_with_one_request_for_each_file(
    bucket: tuple[Any, str, dict[str, Any]],
) -> None:
    server, root, options = bucket
    for name, num_rows in (("a", 10), ("b", 10), ("long-footer", 3000)):
        sink = io.BytesIO()
        pq.write_table(pa.table({"id": range(num_rows)}), sink, row_group_size=2)
        storage.publish(f"{root}/{name}.parquet", sink.getvalue(), options)
    server.requests.clear()
    found = open_manifest(root, listing_path="memory://none/listing.parquet", storage_options=options)
    assert found.num_rows == 3020
    asked = [request for request in server.requests if ".parquet" in request]
    assert [request.partition(" ")[0] for request in asked] == ["GET"] * 4, "the long footer takes a second one"


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_s3_an_object_replaced_after_the_manifest_was_opened_is_noticed_without_further_requests(
    format: str, bucket: tuple[Any, str, dict[str, Any]], tmp_path: Path
) -> None:
    server, root, options = bucket
    path = f"{root}/m.{format}"

    def replace_by(ids: list[str]) -> None:
        local = write_rows(tmp_path / f"m.{format}", ids)
        storage.publish_file(local, path, options)

    replace_by(["a", "b"])
    for whole in (path, root):  # its version from a look at the object, or from a listing
        found = open_manifest(whole, listing_path="memory://none/listing.parquet", storage_options=options)
        server.requests.clear()
        assert [row["id"] for row in rows_of(found)] == ["a", "b"]
        assert sum(request.startswith("HEAD") for request in server.requests) == 1, "the client's own, at opening"
    replace_by(["b", "a"])
    with pytest.raises(ManifestError, match="was changed in the meantime"):
        rows_of(found)


def test_s3_keys_with_several_slashes_in_a_row_are_found(bucket: tuple[Any, str, dict[str, Any]]) -> None:
    server, root, options = bucket
    prefix = root.removeprefix("s3://bucket/")
    keys = [f"{prefix}//a.jpg", f"{prefix}/b//c.jpg", f"{prefix}/d.jpg"]
    for key in keys:
        server.client().put_object(Bucket="bucket", Key=key, Body=key.encode())
    found = [info.path for info in storage.list_files(root, options)]
    assert found == [f"s3://bucket/{key}" for key in keys]
    assert [storage.read_bytes(path, options).decode() for path in found] == keys
    listing = f"s3://bucket/{uuid.uuid4().hex}/listing.parquet"
    manifest = open_manifest(root, listing_path=listing, storage_options=options, listing_options=options)
    for base, names in ((root, [row["image"] for row in rows_of(manifest)]), (f"{root}/b/", ["c.jpg"])):
        fetcher = Fetcher(
            FetchOptions(
                base=base,
                allow=(),
                allow_private_hosts=False,
                storage_options=options,
                timeout_s=30,
                max_bytes=999,
                retries=0,
            )
        )
        assert {fetcher.fetch(name).decode() for name in names} == set(keys if base == root else keys[1:2])


def test_s3_a_listing_shows_what_others_have_written_since(bucket: tuple[Any, str, dict[str, Any]]) -> None:
    server, root, options = bucket
    for count in (1, 2, 3):
        key = f"{root.removeprefix('s3://bucket/')}/{count}"
        server.client().put_object(Bucket="bucket", Key=key, Body=b"x")  # another process: our own client knows nothing
        assert len(storage.list_files(root, options, recursive=False)) == count
        assert len(storage.glob(f"{root}/*", options)) == count
        assert storage.exists(f"{root}/{count}", options)


def test_s3_a_file_is_made_once(bucket: tuple[Any, str, dict[str, Any]]) -> None:
    _, root, options = bucket
    storage.create(f"{root}/lease", b"first", options)
    with pytest.raises(FileExistsError):
        storage.create(f"{root}/lease", b"second", options)
    assert storage.read_bytes(f"{root}/lease", options) == b"first"
