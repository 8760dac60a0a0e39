"""Paths on disk and in a bucket: the same behaviour for both, atomic publishing, and errors a person can act on."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline import storage
from pipeline.storage import StorageError


@pytest.fixture(params=["disk", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, or an empty prefix of an in-memory bucket."""
    return str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}/data"


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def put(path: str, data: bytes = b"x") -> None:
    storage.make_dir(storage.parent(path))
    storage.publish(path, data)


def test_what_is_published_can_be_read_listed_and_deleted(root: str) -> None:
    path = storage.join(root, "deep", "file.bin")
    assert not storage.exists(path)
    put(path, b"first")
    put(path, b"second!")
    assert storage.exists(path) and not storage.is_dir(path)
    assert storage.is_dir(storage.join(root, "deep"))
    assert storage.read_bytes(path) == b"second!"
    (info,) = storage.list_files(root)
    assert (info.path, info.size) == (path, 7) and info.version
    assert storage.file_info(path) == info
    storage.delete(path)
    storage.delete(path)
    assert not storage.exists(path) and storage.list_files(root) == []


def test_an_open_file_can_be_read_in_pieces_and_seeked(root: str) -> None:
    path = storage.join(root, "file.bin")
    put(path, bytes(range(256)) * 100)
    for random_access in (False, True):
        with storage.open_input(path, random_access=random_access) as file:
            assert file.read(3) == b"\x00\x01\x02"
            assert file.seek(-2, os.SEEK_END) == 25_598
            assert file.read() == b"\xfe\xff"
            file.seek(256)
            assert file.read(1) == b"\x00"
            assert len(file.read()) == 256 * 99 - 1


def test_listings_are_sorted_and_leave_out_hidden_and_temporary_files(root: str) -> None:
    for name in ("b.txt", "a/z.txt", "a.txt", ".hidden", ".git/config", "a/.b.txt.123.tmp", "_SUCCESS"):
        put(storage.join(root, name))
    names = [info.path.removeprefix(root + "/") for info in storage.list_files(root)]
    assert names == sorted(["_SUCCESS", "a.txt", "a/z.txt", "b.txt"])
    flat = [storage.name(info.path) for info in storage.list_files(root, recursive=False)]
    assert flat == ["_SUCCESS", "a.txt", "b.txt"]
    assert [storage.name(info.path) for info in storage.glob(storage.join(root, "*.txt"))] == ["a.txt", "b.txt"]
    assert [storage.name(i.path) for i in storage.glob(storage.join(root, "**/*.txt"))] == ["a.txt", "z.txt", "b.txt"]


def test_a_missing_folder_has_no_files_and_a_missing_file_is_not_found(root: str) -> None:
    assert storage.list_files(storage.join(root, "nowhere")) == []
    for read in (storage.open_input, storage.read_bytes, storage.file_info):
        with pytest.raises(FileNotFoundError):
            read(storage.join(root, "nowhere"))


def test_a_listing_sees_what_was_written_since_the_last_one(root: str) -> None:
    put(storage.join(root, "1"))
    assert len(storage.list_files(root)) == 1
    put(storage.join(root, "2"))
    assert len(storage.list_files(root)) == 2


def test_a_local_file_is_published_as_it_is(root: str, tmp_path: Path) -> None:
    source = tmp_path.parent / f"{uuid.uuid4().hex}.bin"
    source.write_bytes(b"content" * 1000)
    storage.make_dir(root)
    storage.publish_file(source, storage.join(root, "copy.bin"))
    assert storage.read_bytes(storage.join(root, "copy.bin")) == b"content" * 1000


def test_a_folder_can_be_deleted_whole(root: str) -> None:
    put(storage.join(root, "run", "a", "1"))
    put(storage.join(root, "run", "2"))
    storage.delete(storage.join(root, "run"), recursive=True)
    assert storage.list_files(root) == []


# ---------------------------------------------------------------------------------------------------------------------
# Paths


@pytest.mark.parametrize(
    ("path", "parent", "name", "remote"),
    [
        ("s3://bucket/folder/file.parquet", "s3://bucket/folder", "file.parquet", True),
        ("s3://bucket/file.parquet", "s3://bucket", "file.parquet", True),
        ("gs://bucket/folder/", "gs://bucket", "folder", True),
        ("/data/file.parquet", "/data", "file.parquet", False),
        ("file:///data/file.parquet", "/data", "file.parquet", False),
        ("/file", "/", "file", False),
        ("file", ".", "file", False),
        ("data/folder/", "data", "folder", False),
    ],
)
def test_paths_come_apart_the_same_on_disk_and_in_buckets(path: str, parent: str, name: str, remote: bool) -> None:
    assert (storage.parent(path), storage.name(path), storage.is_remote(path)) == (parent, name, remote)


def test_join_puts_one_slash_between_names() -> None:
    assert storage.join("s3://b", "a", "c") == "s3://b/a/c"
    assert storage.join("/data/", "a") == "/data/a"
    assert storage.join("/", "a") == "/a"


@pytest.mark.parametrize(
    ("pattern", "base"),
    [
        ("/data/*.parquet", "/data"),
        ("/data/a*/x.csv", "/data"),
        ("s3://b/p/part-?.parquet", "s3://b/p"),
        ("*.csv", "."),
    ],
)
def test_the_base_of_a_glob_is_the_folder_above_the_first_wildcard(pattern: str, base: str) -> None:
    assert storage.is_glob(pattern) and storage.glob_base(pattern) == base


def test_a_link_back_up_does_not_make_a_listing_endless(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    names = [info.path.removeprefix(f"{tmp_path}/") for info in storage.list_files(str(tmp_path))]
    assert names == ["a/file", "linked/file"]


# ---------------------------------------------------------------------------------------------------------------------
# Publishing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result"
    storage.publish(str(path), b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        storage.publish(str(path), b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["result"] and path.read_bytes() == b"old"


def test_a_reader_sees_the_old_or_the_new_file_and_never_a_part(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    versions = [bytes([number]) * 300_000 for number in range(40)]
    storage.publish(path, versions[0])
    stop = threading.Event()
    broken: list[bytes] = []

    def watch() -> None:
        while not stop.is_set():
            data = storage.read_bytes(path)
            if data not in versions:
                broken.append(data)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for version in versions:
        storage.publish(path, version)
    stop.set()
    watcher.join()
    assert not broken


def test_what_killed_writers_left_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "task=count").mkdir()
    kept = [".lease", ".hidden.tmp", "notes.tmp", "part-00000.parquet", "task=count/part-00000.parquet"]
    for name in [*kept, ".run.json.4711-0123abcd.tmp", "task=count/.part-00000.parquet.4711-0123abcd.tmp"]:
        (tmp_path / name).write_text("?")
    (tmp_path / "own").write_text("?")
    seen: list[str] = []

    def write(file: Any) -> None:
        seen.extend(path.name for path in tmp_path.glob(".own.*"))
        file.write(b"!")
        storage.sweep(str(tmp_path))
        assert not list(tmp_path.glob(".own.*")), "the sweep knows the names that writers give"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage._publish_local(str(tmp_path / "own"), write)
    assert len(seen) == 1
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted([*kept, "own"])


def test_a_writer_killed_half_way_leaves_nothing_that_is_listed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pipeline import storage\n"
        "storage.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "storage.publish(sys.argv[1], b'half')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")], check=False, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == -9
    assert len(list(tmp_path.iterdir())) == 1  # the temporary file
    assert storage.list_files(str(tmp_path)) == [] and not storage.exists(str(tmp_path / "file"))


# ---------------------------------------------------------------------------------------------------------------------
# Errors and retries


class SlowDown(Exception):
    """As botocore's ClientError looks."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class EndpointConnectionError(Exception):
    """As botocore's error of this name."""


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError("slow"), True),
        (OSError(errno.EBUSY, "Please reduce your request rate."), True),
        (OSError(errno.EIO, "We encountered an internal error."), True),
        (OSError(errno.EREMOTEIO, "We encountered an internal error."), True),
        (SlowDown("SlowDown", 503), True),
        (SlowDown("InternalError", 500), True),
        (EndpointConnectionError("could not connect"), True),
        (SlowDown("AccessDenied", 403), False),
        (SlowDown("ExpiredToken", 400), False),
        (PermissionError("The provided token has expired."), False),
        (FileNotFoundError("no"), False),
        (OSError(errno.ENOSPC, "full"), False),
        (ValueError("a bug"), False),
    ],
)
def test_transient_errors_are_told_from_permanent_ones(error: Exception, transient: bool) -> None:
    assert storage.is_transient(error) is transient


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exception]]:
    """Errors that the in-memory bucket raises, one a call, before it works again."""
    errors: list[Exception] = []
    kind: Any = fsspec.get_filesystem_class("memory")

    def failing(name: str) -> None:
        real = getattr(kind, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if errors:
                raise errors.pop(0)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, method)

    for name in ("pipe_file", "cat_file", "find"):
        failing(name)
    yield errors


def test_transient_errors_are_tried_again_with_growing_pauses(flaky: list[Exception], no_pauses: list[float]) -> None:
    path = f"memory://{uuid.uuid4().hex}/file"
    flaky += [ConnectionResetError("reset"), SlowDown("SlowDown", 503)]
    storage.publish(path, b"x")
    assert len(no_pauses) == 2
    flaky += [TimeoutError("slow")]
    assert storage.read_bytes(path) == b"x"


def test_an_error_that_stays_says_how_often_it_was_tried(flaky: list[Exception], no_pauses: list[float]) -> None:
    flaky += [SlowDown("SlowDown", 503)] * 10
    with pytest.raises(StorageError, match=r"memory://b/file: SlowDown: .*\(tried 5 times\)"):
        storage.publish("memory://b/file", b"x")
    assert len(no_pauses) == 4 and max(no_pauses) <= storage.LONGEST_PAUSE_S


def test_permanent_errors_are_not_tried_again(flaky: list[Exception], no_pauses: list[float]) -> None:
    flaky += [PermissionError("expired")]
    with pytest.raises(PermissionError, match="expired"):
        storage.publish("memory://b/file", b"x")
    flaky += [SlowDown("AccessDenied", 403)]
    with pytest.raises(StorageError, match="AccessDenied"):
        storage.publish("memory://b/file", b"x")
    assert no_pauses == []


def test_a_read_goes_on_at_the_same_byte_after_a_lost_connection(no_pauses: list[float]) -> None:
    class Breaking(io.BytesIO):
        """Fails every second read, after having moved."""

        calls = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.calls += 1
            data = super().read(size)
            if self.calls % 2:
                raise ConnectionResetError("reset")
            return data

    content = os.urandom(100_000)
    reader = io.BufferedReader(storage._RetryingReader(Breaking(content), "s3://b/x"), 4096)
    assert b"".join(iter(lambda: reader.read(7000), b"")) == content


def test_a_missing_extra_says_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(StorageError, match=r"pip install 'qwen2-vl-batch\[s3\]'"):
        storage.exists("s3://bucket/file")
    with pytest.raises(StorageError, match=r"pip install 'qwen2-vl-batch\[gcs\]'"):
        storage.exists("gs://bucket/file")


def test_an_unknown_scheme_is_an_error_in_one_line() -> None:
    with pytest.raises(StorageError, match="can't open nonsense://x"):
        storage.read_bytes("nonsense://x")


def test_options_reach_the_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(path: str, **options: Any) -> Any:
        seen.update(options)
        return fsspec.filesystem("memory"), "/x"

    monkeypatch.setattr(fsspec.core, "url_to_fs", spy)
    storage.exists("s3://bucket/x", {"endpoint_url": "http://127.0.0.1:9000"})
    assert seen["endpoint_url"] == "http://127.0.0.1:9000"


# ---------------------------------------------------------------------------------------------------------------------
# A real S3 endpoint


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


def test_s3_a_file_is_made_once(bucket: tuple[Any, str, dict[str, Any]]) -> None:
    _, root, options = bucket
    storage.create(f"{root}/lease", b"first", options)
    with pytest.raises(FileExistsError):
        storage.create(f"{root}/lease", b"second", options)
    assert storage.read_bytes(f"{root}/lease", options) == b"first"
