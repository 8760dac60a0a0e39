"""Paths on disk and in a bucket: the same behaviour for both, atomic publishing, and errors a person can act on."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.spec import AbstractBufferedFile

from pipeline import storage
from pipeline.storage import CredentialsRefused, FileInfo, StorageError, buckets
from pipeline.storage.read import _remote_info
from pipeline.storage.write import replaced


@pytest.fixture(params=["disk", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, or an empty prefix of an in-memory bucket."""
    return str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}/data"


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


def test_an_empty_prefix_is_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert [info.path for info in storage.list_files("")] == ["sub/file"]
    assert [info.path for info in storage.glob("*/file")] == ["sub/file"]
    assert storage.read_bytes("sub/file") == b"x"


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
    with pytest.raises(KeyboardInterrupt), replaced(str(tmp_path / "own")) as temporary:
        Path(temporary).write_text("!")
        storage.sweep(str(tmp_path))
        assert not os.path.exists(temporary), "the sweep knows the names that writers give"
        raise KeyboardInterrupt
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted([*kept, "own"])


def test_a_writer_killed_half_way_leaves_nothing_that_is_listed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pipeline import storage\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
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


def client_error(code: str, status: int) -> Exception:
    """As botocore raises."""
    error = type("ClientError", (Exception,), {})(f"An error occurred ({code}) when calling PutObject")
    error.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return error  # type: ignore[no-any-return]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were asked for between attempts; none is slept."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


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


def test_transient_errors_are_tried_again(flaky: list[Exception], pauses: list[float]) -> None:
    path = f"memory://{uuid.uuid4().hex}/file"
    flaky += [ConnectionResetError("reset"), client_error("SlowDown", 503)]
    storage.publish(path, b"x")
    assert len(pauses) == 2
    flaky += [TimeoutError("slow")]
    assert storage.read_bytes(path) == b"x"


def test_an_error_that_stays_says_how_often_it_was_tried(flaky: list[Exception], pauses: list[float]) -> None:
    flaky += [client_error("SlowDown", 503)] * 10
    with pytest.raises(StorageError, match=r"memory://b/file: ClientError: .*SlowDown.*\(tried 5 times\)"):
        storage.publish("memory://b/file", b"x")
    assert len(pauses) == 4


def test_permanent_errors_are_not_tried_again(flaky: list[Exception], pauses: list[float]) -> None:
    flaky += [PermissionError("expired")]
    with pytest.raises(PermissionError, match="expired"):
        storage.publish("memory://b/file", b"x")
    flaky += [client_error("AccessDenied", 403)]
    with pytest.raises(StorageError, match="AccessDenied"):
        storage.publish("memory://b/file", b"x")
    flaky += [client_error("ExpiredToken", 400)]
    with pytest.raises(CredentialsRefused, match=r"ExpiredToken.*renew them"):
        storage.publish("memory://b/file", b"x")
    assert pauses == []


def test_no_credentials_on_this_machine_is_said_with_its_name(flaky: list[Exception]) -> None:
    """On a cluster the driver may have some that a worker lacks."""
    flaky.append(type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"))
    with pytest.raises(CredentialsRefused, match=rf"the machine {socket.gethostname()} has no credentials .* anon"):
        storage.publish("memory://b/file", b"x")


def test_google_s_client_is_not_asked_where_it_can_not_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would try for three minutes."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        options = {"endpoint_url": f"http://127.0.0.1:{unused.getsockname()[1]}"}
        with pytest.raises(StorageError, match=r"can't reach Google Cloud Storage at 127\.0\.0\.1:\d+: .*online"):
            storage.exists("gs://bucket/file", options)


class FlakyFile(AbstractBufferedFile):  # type: ignore[misc]
    """A file whose connection breaks at every second request, also in the middle of a read."""

    content = os.urandom(2_500_000)
    requests = 0

    def _fetch_range(self, start: int, end: int) -> bytes:
        self.requests += 1
        if self.requests % 2:
            raise ConnectionResetError("reset")
        return self.content[start:end]


@pytest.mark.parametrize("random_access", [False, True])
def test_a_read_goes_on_at_the_same_byte_after_a_lost_connection(
    random_access: bool, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    memory = fsspec.filesystem("memory")
    opened: list[FlakyFile] = []

    def open_flaky(path: str, mode: str, cache_type: str) -> FlakyFile:
        assert cache_type == ("none" if random_access else "readahead")
        opened.append(
            FlakyFile(memory, path, mode, block_size=5000, cache_type=cache_type, size=len(FlakyFile.content))
        )
        return opened[0]

    monkeypatch.setattr(type(memory), "open", lambda self, *args, **options: open_flaky(*args, **options))
    with storage.open_input("memory://b/x", random_access=random_access) as reader:
        assert b"".join(iter(lambda: reader.read(7000), b"")) == FlakyFile.content
        assert reader.seek(-3, os.SEEK_END) == 2_499_997 and reader.read() == FlakyFile.content[-3:]
        assert not opened[0].closed
    assert opened[0].closed and len(pauses) >= 3


def test_a_file_system_without_caches_opens_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"memory://{uuid.uuid4().hex}/file"
    storage.publish(path, b"content")
    kind: Any = fsspec.get_filesystem_class("memory")
    real = kind.open
    monkeypatch.setattr(kind, "open", lambda self, path, mode: real(self, path, mode))
    with storage.open_input(path) as file:
        assert file.read() == b"content"


def test_a_missing_extra_says_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    monkeypatch.setattr(buckets, "_check_google", lambda endpoint: None)
    for scheme, extra in (("s3", "s3"), ("s3a", "s3"), ("gs", "gcs"), ("gcs", "gcs")):
        with pytest.raises(StorageError, match=rf"pip install 'qwen2-vl-batch\[{extra}\]'"):
            storage.exists(f"{scheme}://bucket/file")
    with pytest.raises(StorageError, match="the file system for hdfs:// is not installed; Install s3fs to access S3"):
        storage.exists("hdfs://host/file")


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


def test_an_object_s_version_is_its_etag_where_it_has_one_and_else_its_time() -> None:
    when = datetime(2026, 1, 2, tzinfo=UTC)
    etag = _remote_info("s3://b/k", {"size": 3, "ETag": '"abc"', "LastModified": when})
    assert etag == FileInfo("s3://b/k", 3, "abc")
    times = [_remote_info("m://b/k", {"size": None, "created": time}) for time in (when, when.timestamp())]
    assert times == [FileInfo("m://b/k", 0, str(when.timestamp()))] * 2
    assert _remote_info("m://b/k", {}) == FileInfo("m://b/k", 0, None)


def test_a_link_to_nothing_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "itself").symlink_to("itself")
    assert not storage.exists(str(tmp_path / "link")) and storage.list_files(str(tmp_path)) == []
    assert len(storage.list_files(str(tmp_path), dangling=True)) == 2


def test_a_download_of_another_size_than_the_listing_s_leaves_nothing(root: str, tmp_path: Path) -> None:
    path, local = storage.join(root, "weights.bin"), tmp_path / "local" / "weights.bin"
    local.parent.mkdir()
    put(path, b"12345")
    info = storage.file_info(path)
    storage.download(info, str(local))
    assert local.read_bytes() == b"12345"
    local.unlink()
    with pytest.raises(StorageError, match=r"5 bytes came; the listing says 6"):
        storage.download(replace(info, size=6), str(local))
    assert list(local.parent.iterdir()) == []
