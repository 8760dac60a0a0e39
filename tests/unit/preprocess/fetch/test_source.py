"""Where rows may take their media from, what they may not reach, and which faults are tried again."""

from __future__ import annotations

import base64
import contextlib
import http.server
import os
import socket
import socketserver
import ssl
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline import storage
from pipeline.errors import (
    AccessDenied,
    ConfigError,
    CredentialError,
    FetchError,
    FetchTimeout,
    MediaNotFound,
    MediaTooLarge,
)
from pipeline.preprocess.fetch import allow
from pipeline.preprocess.fetch import http as http_module
from pipeline.preprocess.fetch.allow import is_public
from pipeline.preprocess.fetch.proxy import proxy_notes
from pipeline.preprocess.fetch.source import Fetcher
from pipeline.preprocess.fetch.uri import base64_header
from pipeline.storage import retry
from tests.options import fetch_options


class Server(http.server.ThreadingHTTPServer):
    """A web server on this machine that answers as its `answers` say, path by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        self.num_connections = 0

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.num_connections += 1
        return True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def give(self, path: str, body: bytes, status: int = 200, **headers: str) -> None:
        def answer(request: http.server.BaseHTTPRequestHandler) -> None:
            request.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                request.send_header(name.replace("_", "-"), value)
            request.end_headers()
            request.wfile.write(body)

        self.answers[path] = answer


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path)
        self.server.answers[self.path](self)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def fetcher(base: Path | str = "/nowhere", **options: Any) -> Fetcher:
    return Fetcher(fetch_options(str(base), **{"retries": 2, "timeout_s": 5.0, **options}))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A manifest's folder with a picture, and a secret beside it."""
    folder = tmp_path / "manifest"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a b.jpg").write_bytes(b"picture")
    (tmp_path / "secret.txt").write_bytes(b"secret")
    return folder


def test_a_file_is_found_by_every_way_of_naming_it(tree: Path) -> None:
    fetch = fetcher(tree).fetch
    whole = tree / "sub" / "a b.jpg"
    for source in ("sub/a b.jpg", str(whole), f"file://{whole}", f"file://localhost{whole}", whole.as_uri()):
        assert fetch(source) == b"picture"
    assert fetch(b"bytes in the row") == b"bytes in the row"
    assert fetch("sub/../sub/a b.jpg") == b"picture"


def test_a_missing_file_is_not_found(tree: Path) -> None:
    for source in ("nothing.jpg", "sub/a b.jpg/inside", "sub/\x00", f"file://{tree}/%00.png", "file:///%ff/%00"):
        with pytest.raises(MediaNotFound):
            fetcher(tree).fetch(source)


@pytest.mark.parametrize("base", ["/nowhere", "memory://photos/set", "https://photos.example/set"])
@pytest.mark.parametrize(
    ("start", "header"),
    [
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "data:image/jpeg;base64,"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "data:image/png;base64,"),
        (b"GIF89a", "data:image/gif;base64,"),
        (b"RIFF\x00\x00\x00\x00WEBP", "data:image/webp;base64,"),
        (b"II*\x00\x08\x00", "data:image/tiff;base64,"),
        (b"MM\x00*\x00\x00", "data:image/tiff;base64,"),
        (b"\x00\x00\x00\x20ftypisom", "data:video/mp4;base64,"),
        (b"\x1aE\xdf\xa3", "data:video/webm;base64,"),
        (b"BM", "data:;base64,"),  # too little to tell: any long text of this alphabet
    ],
)
def test_bare_base64_is_told_from_a_path(base: str, start: bytes, header: str) -> None:
    source = base64.b64encode(start + bytes(range(256)) * 4).decode()
    for text in (source, "\n".join(textwrap.wrap(source, 76)) + "\n"):
        for call in (fetcher(base).fetch, fetcher(base).open):
            with pytest.raises(MediaNotFound, match=f"content of a file, not its place: write {header} before it"):
                call(text)
    assert fetcher(base).fetch(header + source).startswith(start)
    with pytest.raises(MediaNotFound, match="write data: before it"):
        fetcher(base).fetch(f"image/png;base64,{source}")


@pytest.mark.parametrize("source", ["9j/4AAQSkZJRgABAQAAAQABAAD.jpg", "iVBORw0KGgo.png", "a" * 200, "iVBORw0KGgo", ""])
def test_a_name_that_only_resembles_base64_is_a_path(tree: Path, source: str) -> None:
    assert base64_header(source) is None
    (tree / "sub" / (source or "x")).write_bytes(b"picture") if "/" not in source else None
    if "/" not in source:
        assert fetcher(tree).fetch(f"sub/{source or 'x'}") == b"picture"


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("sub\\a b.jpg", r"no such file; the name has backslashes: folders are separated by /"),
        ("C:\\photos\\a.jpg", r"the name has backslashes"),
        ("sub/cafe\u0301.jpg", r"the name is in decomposed Unicode \(NFD\)"),
        ("sub/caf\u00e9.jpg", r"the name is in composed Unicode \(NFC\)"),
        ("sub/cafe.jpg", r"no such file$"),
        ("5", r"^5: no such file; it is a number: write the path or URI of a medium$"),
    ],
)
def test_a_missing_file_whose_name_may_be_spelt_otherwise_has_a_hint(tree: Path, source: str, hint: str) -> None:
    with pytest.raises(MediaNotFound, match=hint):
        fetcher(tree).fetch(source)


@pytest.mark.parametrize("source", ["../secret.txt", "/etc/passwd", "file:///etc/passwd", "sub/../../secret.txt"])
def test_files_outside_the_manifests_tree_are_refused_with_the_rule(tree: Path, source: str) -> None:
    with pytest.raises(
        AccessDenied, match=r" is outside the folders that rows may read \(.*\); add /\S+ to input\.allow"
    ):
        fetcher(tree).fetch(source)


def test_a_symbolic_link_out_of_the_tree_is_refused_and_one_within_is_followed(tree: Path) -> None:
    (tree / "leak.jpg").symlink_to(tree.parent / "secret.txt")
    (tree / "up").symlink_to(tree.parent)
    (tree / "fine.jpg").symlink_to(tree / "sub" / "a b.jpg")
    for source in ("leak.jpg", "up/secret.txt"):
        with pytest.raises(AccessDenied) as caught:
            fetcher(tree).fetch(source)
        assert str(caught.value) == (
            f"{source} resolves to {tree.parent}/secret.txt, outside the folders that rows may read ({tree}); "
            f"add {tree.parent} to input.allow"
        )
    assert fetcher(tree).fetch("fine.jpg") == b"picture"


def test_a_tree_that_is_itself_reached_by_a_link_is_allowed(tree: Path) -> None:
    (tree.parent / "alias").symlink_to(tree)
    assert fetcher(tree.parent / "alias").fetch("sub/a b.jpg") == b"picture"


def test_allow_opens_a_folder_and_a_star_opens_all_of_them(tree: Path) -> None:
    secret = str(tree.parent / "secret.txt")
    assert fetcher(tree, allow=(str(tree.parent),)).fetch(secret) == b"secret"
    assert fetcher(tree, allow=("*",)).fetch(secret) == b"secret"
    with pytest.raises(AccessDenied):
        fetcher(tree, allow=(str(tree.parent / "sec"),)).fetch(secret)


def test_a_file_uri_of_another_host_is_refused(tree: Path) -> None:
    with pytest.raises(AccessDenied, match="host nas"):
        fetcher(tree).fetch("file://nas/share/a.jpg")


def test_pipes_and_devices_do_not_hang(tree: Path) -> None:
    os.mkfifo(tree / "pipe.jpg")
    with pytest.raises(AccessDenied, match="not a regular file"):
        fetcher(tree).fetch("pipe.jpg")
    with pytest.raises(FetchError):
        fetcher(tree, allow=("*",)).fetch("/dev/zero")
    with pytest.raises(FetchError):
        fetcher(tree).fetch("sub")


def test_more_bytes_than_allowed_are_refused_with_both_numbers(tree: Path) -> None:
    for source in ("sub/a b.jpg", b"picture", "data:,picture"):
        with pytest.raises(MediaTooLarge, match=r"7 bytes; at most 6 are fetched \(media\.max_bytes\)"):
            fetcher(tree, max_bytes=6).fetch(source)


def test_data_uris_are_read_with_and_without_base64() -> None:
    fetch = fetcher().fetch
    assert fetch("data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()) == b"\x89PNG"
    assert fetch("data:,a%20b") == b"a b"
    assert fetch("data:;base64,YW Jj\n") == b"abc"
    for broken in ("data:image/png;base64", "data:;base64,a*b"):
        with pytest.raises(FetchError):
            fetch(broken)


def test_unknown_schemes_are_refused() -> None:
    for source in ("ftp://host/a.jpg", "gopher://host/", "sftp://host/a"):
        with pytest.raises(AccessDenied):
            fetcher().fetch(source)


# -- buckets, by fsspec's own in-memory one --------------------------------------------------------------------------


@pytest.fixture
def bucket() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/photos/set/a.jpg": b"picture", "/photos/set/empty": b"", "/private/b.jpg": b"secret"})
    yield memory
    memory.store.clear()


def test_objects_below_the_manifest_are_read_and_others_refused(bucket: Any) -> None:
    fetch = fetcher("memory://photos/set").fetch
    assert fetch("a.jpg") == fetch("memory://photos/set/a.jpg") == b"picture"
    assert fetch("empty") == b""
    with pytest.raises(MediaNotFound, match="no such object"):
        fetch("missing.jpg")
    for source in ("memory://private/b.jpg", "../../private/b.jpg", "memory://photos/set/../../private/b.jpg"):
        with pytest.raises(AccessDenied, match=r"outside the buckets .*; add memory://\S*private to input"):
            fetch(source)
    assert fetcher("memory://photos/set", allow=("memory://private",)).fetch("memory://private/b.jpg") == b"secret"
    with pytest.raises(AccessDenied, match="absolute path"):
        fetch("/etc/passwd")
    with pytest.raises(AccessDenied):
        fetch("file:///etc/passwd")


def test_an_object_that_is_too_large_is_refused(bucket: Any) -> None:
    with pytest.raises(MediaTooLarge, match="more than 6 bytes"):
        fetcher("memory://photos/set", max_bytes=6).fetch("a.jpg")


def test_the_whole_bucket_of_the_manifest_is_allowed_but_no_other() -> None:
    from pipeline.preprocess.fetch.uri import bucket_of

    assert bucket_of("s3://bucket/deep/prefix") == "s3://bucket"
    assert bucket_of("gcs://bucket/deep") == "gs://bucket"
    assert bucket_of("hf://datasets/org/name/data") == "hf://datasets/org/name"


def test_a_uri_is_never_a_chain_of_file_systems(bucket: Any, tree: Path) -> None:
    bucket.pipe({"/photos/set/x": b"inner"})
    for chain in (
        f"memory://photos/set/x::file://{tree}/../secret.txt",
        "memory://photos/set/x::memory://private/b.jpg",
    ):
        with pytest.raises(MediaNotFound):
            fetcher("memory://photos/set").fetch(chain)


def test_options_may_be_sorted_by_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Any]] = []

    def open_file_system(url: str, options: Any) -> Any:
        seen.append((url, options))
        return fsspec.filesystem("memory"), ""

    monkeypatch.setattr(storage, "file_system", open_file_system)
    sorted_options = {"s3": {"profile": "a"}, "gcs": {"token": "b"}}
    for options in ({"profile": "flat", "client_kwargs": {"region_name": "x"}}, sorted_options):
        for uri in ("s3a://bucket/a", "gs://bucket/a", "hf://datasets/org/name/a"):
            with pytest.raises(MediaNotFound):
                fetcher(allow=("*",), storage_options=options).fetch(uri)
    flat = {"profile": "flat", "client_kwargs": {"region_name": "x"}}
    many = {"config_kwargs": {"max_pool_connections": 256}}  # a few slow objects must not take them all
    assert [options for _, options in seen] == [
        {**flat, **many}, flat, flat, {"profile": "a", **many}, {"token": "b"}, {},
    ]  # fmt: skip
    assert [url for url, _ in seen] == ["s3://", "gs://", "hf://"] * 2


def test_a_bucket_that_throttles_is_asked_again(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    answers = scripted(bucket, monkeypatch)
    slow_down = as_s3fs_raises("SlowDown", "Please reduce your request rate.")
    internal = as_s3fs_raises("InternalError", "We encountered an internal error. Please try again.")
    answers += [slow_down, ConnectionError("reset"), b"picture", internal, b"picture"]
    assert fetcher("memory://photos/set").fetch("a.jpg") == b"picture"
    assert fetcher("memory://photos/set").fetch("a.jpg") == b"picture"
    answers[:] = [slow_down] * 3
    with pytest.raises(FetchError, match=r"Please reduce your request rate\. \(tried 3 times\)"):
        fetcher("memory://photos/set").fetch("a.jpg")


def test_a_mere_refusal_is_the_row_s_and_final(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = scripted(bucket, monkeypatch)
    answers += [as_s3fs_raises("AccessDenied", "Access Denied"), as_s3fs_raises("403", "Forbidden"), b"picture"]
    fetch = fetcher("memory://photos/set").fetch
    for _ in range(2):
        with pytest.raises(AccessDenied):
            fetch("a.jpg")
    assert fetch("a.jpg") == b"picture"


@pytest.mark.parametrize(
    "code", ["ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"]
)
def test_credentials_that_s3_no_longer_takes_end_the_job_and_mark_no_row(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    scripted(bucket, monkeypatch).append(as_s3fs_raises(code, "The provided token has expired."))
    fetch = fetcher("memory://photos/set").fetch
    with pytest.raises(CredentialError, match=rf"{code}: The provided token has expired\.\): renew them and run"):
        fetch("a.jpg")
    with pytest.raises(CredentialError):  # nor is the next row asked for
        fetch("a.jpg")


def test_media_on_an_ftp_server_say_where_to_copy_them() -> None:
    with pytest.raises(FetchError, match=r"ftp://host/a\.jpg: media at ftp:// can't be fetched; copy them to"):
        fetcher(allow=("*",)).fetch("ftp://host/a.jpg")


def test_credentials_that_google_no_longer_takes_end_the_job(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    google = pytest.importorskip("google.auth.exceptions")
    gcsfs_retry = pytest.importorskip("gcsfs.retry")
    refused = gcsfs_retry.HttpError({"code": 401, "message": "Invalid Credentials"})
    for error in (google.RefreshError("invalid_grant: Token has been expired or revoked."), refused):
        scripted(bucket, monkeypatch).append(error)
        with pytest.raises(CredentialError, match="renew them"):
            fetcher("memory://photos/set").fetch("a.jpg")
    # Without credentials of one's own, an object that is not public is that row's error.
    nobody = gcsfs_retry.HttpError({"code": 401, "message": "Anonymous caller does not have storage.objects.get"})
    scripted(bucket, monkeypatch).append(nobody)
    with pytest.raises(FetchError):
        fetcher("memory://photos/set").fetch("a.jpg")


def test_a_client_that_takes_longer_to_give_up_its_credentials_than_a_fetch_may_last_is_found_out(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expired = as_s3fs_raises("ExpiredToken", "The provided token has expired.")

    def cat_file(*args: Any, **options: Any) -> bytes:
        time.sleep(0.4)
        raise expired

    monkeypatch.setattr(type(bucket), "cat_file", cat_file)
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.6)
    with pytest.raises(CredentialError):
        fetcher("memory://photos/set", timeout_s=0.1, retries=3).fetch("a.jpg")


def as_s3fs_raises(code: str, message: str) -> Exception:
    """The exception that s3fs makes of an answer of S3's."""
    exceptions, errors = pytest.importorskip("botocore.exceptions"), pytest.importorskip("s3fs.errors")
    answer = {"Error": {"Code": code, "Message": message}}
    made: Exception = errors.translate_boto_error(exceptions.ClientError(answer, "GetObject"))
    return made


def scripted(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the bucket's `cat_file` gives or raises, call by call."""
    answers: list[Any] = []

    def cat_file(*args: Any, **options: Any) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return bytes(answer)

    monkeypatch.setattr(type(bucket), "cat_file", cat_file)
    return answers


def test_a_bucket_that_hangs_is_a_timeout(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(type(bucket), "cat_file", lambda *args, **options: never.wait(20))
    with pytest.raises(FetchTimeout, match=r"no answer within 0\.2 s"):
        fetcher("memory://photos/set", timeout_s=0.2, retries=0).fetch("a.jpg")
    never.set()


# -- the web ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "169.254.169.254", "10.1.2.3", "[::ffff:127.0.0.1]", "2130706433"],
)
def test_private_network_urls_are_refused(host: str) -> None:
    with pytest.raises(AccessDenied, match=r"private network; set input\.allow_private_hosts"):
        fetcher().fetch(f"http://{host}:9/a.jpg")


def test_a_private_host_may_be_allowed_by_setting_or_by_name(server: Server) -> None:
    server.give("/a.jpg", b"picture")
    with pytest.raises(AccessDenied):
        fetcher().fetch(f"{server.url}/a.jpg")
    assert server.asked == []
    with pytest.raises(AccessDenied):
        fetcher(allow=("*",)).fetch(f"{server.url}/a.jpg")
    assert fetcher(allow_private_hosts=True).fetch(f"{server.url}/a.jpg") == b"picture"
    assert fetcher(allow=("127.0.0.1",)).fetch(f"{server.url}/a.jpg") == b"picture"
    assert fetcher(allow=(server.url,)).fetch(f"{server.url}/a.jpg") == b"picture"


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ("127.0.0.1:PORT", "http://127.0.0.1:PORT"),
        ("http://127.0.0.1:PORT", "http://127.0.0.1:PORT"),
        ("Store.Example", "http://STORE.example:PORT"),
        ("[::1]", "http://[::1]:PORT"),
        ("::1", "http://[::1]:PORT"),
        ("[::1]:PORT", "http://[::1]:PORT"),
        ("http://[0:0:0:0:0:0:0:1]:PORT", "http://[::1]:PORT"),
    ],
)
def test_an_allowed_host_is_recognised_in_every_spelling_and_only_at_its_port(
    server: Server, monkeypatch: pytest.MonkeyPatch, entry: str, url: str
) -> None:
    port = server.server_address[1]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    server.give("/a.jpg", b"picture")
    url = url.replace("PORT", str(port)) + "/a.jpg"
    assert fetcher(allow=(entry.replace("PORT", str(port)),)).fetch(url) == b"picture"
    if "PORT" in entry:
        with pytest.raises(AccessDenied):
            fetcher(allow=(entry.replace("PORT", str(port + 1)),)).fetch(url)


def test_an_entry_with_an_impossible_port_is_refused_as_a_setting() -> None:
    with pytest.raises(ConfigError, match=r"input\.allow: 'host:http' is no host"):
        fetcher(allow=("host:http",))


@pytest.mark.parametrize("first", ["refuses", "is silent"])
def test_every_address_of_a_name_is_tried(server: Server, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    port = server.server_address[1]
    with socket.socket() as full, contextlib.ExitStack() as callers:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # more than its queue holds: the next is not answered
            caller = callers.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(full.getsockname())
        addresses: list[tuple[int, Any]] = [(socket.AF_INET6, ("::1", port, 0, 0))]
        if first == "is silent":
            addresses = [(socket.AF_INET, full.getsockname())]
        addresses.append((socket.AF_INET, ("127.0.0.1", port)))
        found = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in addresses]
        real = socket.getaddrinfo

        def resolve(host: str, *args: Any, **options: Any) -> Any:
            return found if host == "photos.example" else real(host, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        server.give("/a.jpg", b"picture")
        web = fetcher(allow_private_hosts=True, retries=0)
        assert web.fetch(f"http://photos.example:{port}/a.jpg") == b"picture"


def test_a_name_of_which_no_address_answers_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.1", "127.0.0.2")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    with pytest.raises(FetchError, match="Connection refused"):
        fetcher(allow_private_hosts=True, retries=0).fetch(f"http://photos.example:{port}/a.jpg")


# -- proxies ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxied(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server is the environment's proxy for http; its `host:port`."""
    host = f"127.0.0.1:{server.server_address[1]}"
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", f"http://user:pass%21@{host}")
    return host


def test_a_proxy_that_is_allowed_is_used_with_its_credentials(server: Server, proxied: str) -> None:
    seen: list[str | None] = []

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        seen.append(request.headers["Proxy-Authorization"])
        request.send_response(200)
        request.send_header("Content-Length", "7")
        request.end_headers()
        request.wfile.write(b"picture")

    server.answers["http://photos.example/a.jpg"] = answer
    web = fetcher(allow=(proxied,))
    assert web.fetch("http://photos.example/a.jpg") == b"picture"
    assert seen == ["Basic " + base64.b64encode(b"user:pass!").decode()]


def test_a_proxy_that_is_not_allowed_is_left_aside_and_named(
    server: Server, proxied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*args: Any, **options: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    note = rf"the environment's proxy {proxied} is not used: name it in input\.allow"
    with pytest.raises(FetchError, match=rf"can't be found \(Name or service not known\) \({note}") as caught:
        fetcher(retries=0).fetch("http://photos.example/a.jpg")
    assert "pass" not in str(caught.value) and server.asked == []
    assert len(proxy_notes(fetch_options("/nowhere"))) == 1
    assert proxy_notes(fetch_options("/nowhere", allow=(proxied,))) == []


def test_no_proxy_and_private_addresses_are_honoured_beside_a_proxy(
    server: Server, proxied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = fetcher(allow=(proxied,), retries=0)
    for host in ("169.254.169.254", "localhost", "2130706433", "[::1]"):  # the proxy could reach its own network
        with pytest.raises(AccessDenied, match="in a private network"):
            web.fetch(f"http://{host}/a.jpg")
    assert server.asked == []
    monkeypatch.setenv("no_proxy", "127.0.0.1, example")
    server.give("/a.jpg", b"direct")
    assert fetcher(allow=(proxied,)).fetch(f"http://{proxied}/a.jpg") == b"direct"
    assert server.asked == ["/a.jpg"]


@pytest.mark.parametrize("answer", ["200 Connection established", "403 Forbidden"])
def test_https_goes_through_a_tunnel(
    server: Server, secure: Path, proxied: str, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(secure))
    server.give("/a.jpg", b"picture")
    asked = []

    class Tunnel(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked.append(self.rfile.readline())
            while self.rfile.readline().strip():
                pass
            self.wfile.write(f"HTTP/1.1 {answer}\r\n\r\n".encode())
            if answer.startswith("200"):
                with socket.create_connection(("127.0.0.1", server.server_address[1])) as there:
                    copying = threading.Thread(target=_copy, args=(there, self.connection), daemon=True)
                    copying.start()
                    _copy(self.connection, there)
                    copying.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{proxy.server_address[1]}")
        # The name that the certificate holds is a public one here: nobody on this side looks it up.
        monkeypatch.setattr(http_module, "literal_address", lambda host: None)
        web = fetcher(allow=(f"127.0.0.1:{proxy.server_address[1]}",), retries=2)
        if answer.startswith("200"):
            assert [web.fetch("https://localhost:9/a.jpg") for _ in range(2)] == [b"picture"] * 2
        else:
            with pytest.raises(FetchError, match=r"failed: 403 Forbidden \(through the proxy 127.0.0.1:\d+\)"):
                web.fetch("https://localhost:9/a.jpg")
        assert [line.split()[:2] for line in asked] == [[b"CONNECT", b"localhost:9"]]
        proxy.shutdown()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::10.0.0.1", False),
        ("64:ff9b::8.8.8.8", True),
    ],
)
def test_addresses_of_private_networks_are_known_in_every_spelling(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_connections_are_used_again_and_a_new_one_is_checked_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = ["127.0.0.1"]
    resolved: list[str] = []
    real = socket.getaddrinfo

    def resolve(host: str, *args: Any, **options: Any) -> Any:
        resolved.append(host)
        return real(addresses[0] if host == "photos.example" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(allow, "is_public", lambda address: address == "127.0.0.1")
    server.give("/a.jpg", b"picture")
    server.give("/old.jpg", b"moved", 302, Location="/a.jpg")
    server.give("/none.jpg", b"", 404)
    web, url = fetcher(), f"http://photos.example:{server.server_address[1]}"
    for name in ("a.jpg", "old.jpg", "a.jpg"):
        assert web.fetch(f"{url}/{name}") == b"picture"
    assert web.open(f"{url}/a.jpg").read(1, 3) == b"ic"
    assert resolved.count("photos.example") == 1 and server.num_connections == 1

    addresses[0] = "10.0.0.1"  # the name leads elsewhere from now on
    assert web.fetch(f"{url}/a.jpg") == b"picture"
    with pytest.raises(MediaNotFound):  # whose connection is given up
        web.fetch(f"{url}/none.jpg")
    with pytest.raises(AccessDenied, match=r"photos\.example is 10\.0\.0\.1, in a private network"):
        web.fetch(f"{url}/a.jpg")


def test_threads_share_connections_and_each_gets_its_own_answer(server: Server) -> None:
    for number in range(8):
        server.give(f"/{number}", f"picture {number}".encode() * 1000)
    web = fetcher(allow_private_hosts=True)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: web.fetch(f"{server.url}/{number % 8}"), range(64)))
    assert found == [f"picture {number % 8}".encode() * 1000 for number in range(64)]
    assert server.num_connections <= 8


def test_a_server_that_closes_between_requests_is_connected_to_again(server: Server) -> None:
    server.give("/a.jpg", b"picture", Connection="close")
    web = fetcher(allow_private_hosts=True, retries=0)
    for _ in range(2):
        assert web.fetch(f"{server.url}/a.jpg") == b"picture"
    assert server.num_connections == 2


def test_a_name_is_resolved_once_and_a_private_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [[(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.168.1.1", 80))]]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: answers.pop())
    with pytest.raises(AccessDenied, match=r"photos\.example is 192\.168\.1\.1"):
        fetcher().fetch("http://photos.example/a.jpg")


def test_a_redirect_into_the_private_network_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.give("/a.jpg", b"", 302, Location="http://169.254.169.254/latest/meta-data/")
    with pytest.raises(AccessDenied, match=r"redirected to http://169\.254\.169\.254.*private network"):
        fetcher(allow=(server.url,)).fetch(f"{server.url}/a.jpg")
    server.give("/b.jpg", b"", 302, Location="file:///etc/passwd")
    with pytest.raises(AccessDenied, match="only http and https are followed"):
        fetcher(allow=(server.url,)).fetch(f"{server.url}/b.jpg")


def test_redirects_are_followed_but_not_for_ever(server: Server) -> None:
    server.give("/a.jpg", b"", 301, Location="/b.jpg")
    server.give("/b.jpg", b"picture")
    server.give("/loop", b"", 302, Location="/loop")
    fetch = fetcher(allow_private_hosts=True).fetch
    assert fetch(f"{server.url}/a.jpg") == b"picture"
    with pytest.raises(FetchError, match="redirects more than 5 times"):
        fetch(f"{server.url}/loop")


def test_a_response_larger_than_allowed_is_refused_by_header_and_by_count(server: Server) -> None:
    def endless(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            while True:
                request.wfile.write(b"x" * 65536)
        except OSError:
            pass

    server.give("/a.jpg", b"x" * 2000)
    server.answers["/endless"] = endless
    fetch = fetcher(allow_private_hosts=True, max_bytes=1000).fetch
    with pytest.raises(MediaTooLarge, match="2,000 bytes; at most 1,000"):
        fetch(f"{server.url}/a.jpg")
    with pytest.raises(MediaTooLarge, match="more than 1,000 bytes"):
        fetch(f"{server.url}/endless")


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, MediaNotFound), (410, MediaNotFound), (403, AccessDenied), (401, AccessDenied), (418, FetchError)],
)
def test_a_final_answer_is_not_asked_for_again(server: Server, status: int, error: type[FetchError]) -> None:
    server.give("/a.jpg", b"", status)
    with pytest.raises(error, match=str(status)):
        fetcher(allow_private_hosts=True).fetch(f"{server.url}/a.jpg")
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_fault_is_tried_again_and_counted(server: Server, status: int) -> None:
    server.give("/a.jpg", b"", status)
    with pytest.raises(FetchError, match=rf"{status}.*\(tried 3 times\)"):
        fetcher(allow_private_hosts=True).fetch(f"{server.url}/a.jpg")
    assert len(server.asked) == 3


def test_a_connection_that_ends_early_is_tried_again(server: Server) -> None:
    def short_once(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "7")
        request.end_headers()
        request.wfile.write(b"pic" if len(server.asked) == 1 else b"picture")
        request.close_connection = True

    server.answers["/a.jpg"] = short_once
    assert fetcher(allow_private_hosts=True).fetch(f"{server.url}/a.jpg") == b"picture"


@pytest.mark.parametrize("where", ["status line", "headers", "body", "chunks"])
def test_a_server_that_trickles_is_a_timeout_wherever_it_does(server: Server, where: str) -> None:
    stop = threading.Event()
    start, rest = {
        "status line": (b"", b"H"),
        "headers": (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
        "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    }[where]

    def trickle(request: http.server.BaseHTTPRequestHandler) -> None:
        request.wfile.write(start)
        while not stop.wait(0.05):
            try:
                request.wfile.write(rest)
            except OSError:
                return

    server.answers["/a.jpg"] = trickle
    started = time.monotonic()
    with pytest.raises(FetchTimeout, match=r"no answer within 0\.5 s"):
        fetcher(allow_private_hosts=True, timeout_s=0.5, retries=0).fetch(f"{server.url}/a.jpg")
    assert time.monotonic() - started < 30
    stop.set()


def test_each_request_on_a_connection_has_the_whole_time(server: Server) -> None:
    def slow(request: http.server.BaseHTTPRequestHandler) -> None:
        time.sleep(1.5)
        give(request)

    server.give("/a.jpg", b"picture")
    give, server.answers["/a.jpg"] = server.answers["/a.jpg"], slow
    web = fetcher(allow_private_hosts=True, timeout_s=4.0, retries=0)
    for _ in range(4):
        assert web.fetch(f"{server.url}/a.jpg") == b"picture"
    assert server.num_connections == 1


@pytest.fixture
def secure(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The server speaks TLS as `localhost`; the path of its certificate, which nobody trusts yet."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(private)
    (tmp_path / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setattr(http_module, "_tls_context", http_module._tls_context.__wrapped__)
    return tmp_path / "certificate.pem"


def test_a_certificate_that_is_not_trusted_is_final(server: Server, secure: Path) -> None:
    with pytest.raises(
        FetchError, match=r"localhost:\d+/a.jpg: the server's certificate can't be trusted: self.signed"
    ) as caught:
        fetcher(allow_private_hosts=True).fetch(f"https://localhost:{server.server_address[1]}/a.jpg")
    assert "tried" not in str(caught.value)


def test_https_checks_the_host_s_name_keeps_connections_and_ends_in_time(
    server: Server, secure: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(secure))
    server.give("/a.jpg", b"picture")
    url = f"https://localhost:{server.server_address[1]}"
    web = fetcher(allow_private_hosts=True, timeout_s=10.0, retries=0)
    assert [web.fetch(f"{url}/a.jpg") for _ in range(3)] == [b"picture"] * 3
    assert server.num_connections == 1
    with pytest.raises(AccessDenied, match="localhost is 127"):
        fetcher().fetch(f"{url}/a.jpg")
    with pytest.raises(FetchError, match="can't be trusted: IP address mismatch"):
        web.fetch(f"https://127.0.0.1:{server.server_address[1]}/a.jpg")

    def trickle(request: http.server.BaseHTTPRequestHandler) -> None:
        with contextlib.suppress(OSError):
            for letter in "HTTP/1.1 200 OK and many more words than anybody has the time to wait for":
                request.wfile.write(letter.encode())
                time.sleep(0.05)

    server.answers["/b.jpg"] = trickle
    with pytest.raises(FetchTimeout):
        fetcher(allow_private_hosts=True, timeout_s=1.0, retries=0).fetch(f"{url}/b.jpg")


def test_the_certificate_store_is_loaded_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[None] = []
    real = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda: loaded.append(None) or real())
    http_module._tls_context.cache_clear()
    for _ in range(3):
        fetcher()
    assert len(loaded) == 1


def test_compressed_answers_that_nobody_asked_for_are_refused(server: Server) -> None:
    server.give("/a.jpg", b"\x1f\x8b", Content_Encoding="gzip")
    with pytest.raises(FetchError, match="gzip"):
        fetcher(allow_private_hosts=True).fetch(f"{server.url}/a.jpg")


def test_messages_never_show_signatures_or_passwords(server: Server) -> None:
    server.give("/a.jpg?X-Amz-Signature=0123", b"", 404)
    with pytest.raises(MediaNotFound) as caught:
        fetcher(allow_private_hosts=True).fetch(f"{server.url}/a.jpg?X-Amz-Signature=0123")
    assert "0123" not in str(caught.value) and "/a.jpg" in str(caught.value)
    with pytest.raises(AccessDenied) as refused:
        fetcher().fetch("http://user:hunter2@example.com/a.jpg")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://", "http://host:99999/a", "http://exa mple.com/", "http://[::1/"])
def test_a_malformed_url_is_an_error_of_its_row(url: str) -> None:
    with pytest.raises(FetchError):
        fetcher(retries=0).fetch(url)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_parts_of_a_medium_are_read_wherever_it_is(tree: Path, server: Server, bucket: Any) -> None:
    data = bytes(range(256)) * 1024
    (tree / "big.bin").write_bytes(data)
    fsspec.filesystem("memory").pipe_file("/bucket/in/big.bin", data)
    asked: list[str] = []

    def ranges(request: http.server.BaseHTTPRequestHandler) -> None:
        start, stop = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
        asked.append(request.headers["Range"])
        part = data[start : stop + 1]
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        request.wfile.write(part)

    server.answers["/big.bin"] = ranges
    server.give("/whole.bin", data)  # a server that knows no ranges
    server.give("/old.bin", data, 302, Location="/big.bin")
    web = {"allow_private_hosts": True}
    for source in (
        fetcher(tree).open("big.bin"),
        fetcher("memory://bucket/in").open("big.bin"),
        fetcher(tree, **web).open(f"{server.url}/big.bin"),
        fetcher(tree, **web).open(f"{server.url}/old.bin"),
        fetcher(tree, **web).open(f"{server.url}/whole.bin"),
        fetcher(tree).open(data),
        fetcher(tree).open("data:;base64," + base64.b64encode(data).decode()),
    ):
        assert source.size == len(data)
        assert source.first == data[: len(source.first)]
        assert source.read(100_000, 100_300) == data[100_000:100_300]
    assert sorted(asked) == ["bytes=0-65535"] * 2 + ["bytes=100000-100299"] * 2


def test_parts_are_refused_where_the_whole_is(tree: Path, server: Server) -> None:
    server.give("/large.jpg", b"x", 206, Content_Range="bytes 0-0/9999999")
    server.give("/empty.jpg", b"", 416)
    server.give("/gone.jpg", b"", 404)
    patient = fetcher(tree, allow_private_hosts=True, max_bytes=1_000_000)
    with pytest.raises(AccessDenied):
        patient.open("../secret.txt")
    with pytest.raises(AccessDenied):
        patient.open("s3://other/a.jpg")
    with pytest.raises(AccessDenied):
        fetcher(tree).open(f"{server.url}/large.jpg")
    with pytest.raises(MediaNotFound):
        patient.open("sub/missing.jpg")
    with pytest.raises(MediaNotFound):
        patient.open(f"{server.url}/gone.jpg")
    with pytest.raises(MediaTooLarge):
        patient.open(f"{server.url}/large.jpg")
    with pytest.raises(MediaTooLarge):
        fetcher(tree, max_bytes=3).open("sub/a b.jpg")
    assert patient.open(f"{server.url}/empty.jpg").size == 0


def test_a_proxy_that_is_no_url_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy:abc")
    (note,) = proxy_notes(fetch_options("/nowhere"))
    assert "proxy:abc is not used: it is not a URL; expected http://HOST:PORT" in note and "secret" not in note


def test_a_list_of_frames_is_refused_as_soon_as_it_is_too_large(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(b"x" * 1000)
    with pytest.raises(MediaTooLarge, match="2,000 bytes in its first 2"):
        fetcher(tmp_path, max_bytes=1500).fetch(tuple(f"{number}.jpg" for number in range(5)))
