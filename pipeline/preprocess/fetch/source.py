"""A medium's bytes from wherever its row says they are: a path, a bucket, a URL, a data: URI, or the row itself.

Decides which kind of place a source is, reads it within the limits, and repeats what failed for a passing reason. Every
exception of the file system, fsspec and the network ends here, as a FetchError; except that credentials which a bucket
refuses are no row's fault and end the job. What rows may read is decided in `allow.py`, HTTP is in `http.py`; what the
bytes mean is not known here.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import quote, urljoin

from pipeline import storage
from pipeline.conversation import Source
from pipeline.errors import (
    AccessDenied,
    CredentialError,
    FetchError,
    FetchTimeout,
    MediaNotFound,
    MediaTooLarge,
    first_line,
)
from pipeline.preprocess.fetch.allow import AllowList
from pipeline.preprocess.fetch.http import HttpClient
from pipeline.preprocess.fetch.proxy import Proxies
from pipeline.preprocess.fetch.uri import (
    WEB_SCHEMES,
    base64_header,
    data_uri_content,
    local_path,
    missing_hint,
    scheme_of,
    shown,
)
from pipeline.preprocess.frame_list import pack_frames
from pipeline.preprocess.limits import MAX_FETCHES, FetchOptions
from pipeline.storage.credentials import credential_fault
from pipeline.storage.retry import TransientError, is_transient, with_retries

FIRST_BYTES = 64 * 1024
"""What is read of a medium to learn its size, where that takes reading."""

_OF_ONE_HOST = ("ftp", "sftp", "ssh", "smb")
"""Schemes whose file system is opened for one host, where each row could name another."""

T = TypeVar("T")


@dataclass(frozen=True)
class RangedSource:
    """A medium of known size that is read in parts."""

    size: int
    """Bytes of the whole file."""
    read: Callable[[int, int], bytes]
    """Bytes [start, stop) of it; raises as `Fetcher.fetch`."""
    first: bytes = b""
    """Its beginning, as far as that came with the size."""


class Fetcher:
    """Fetches media for the rows of one manifest. Safe to share between threads."""

    def __init__(self, options: FetchOptions) -> None:
        self._options = options
        self._allowed = AllowList(options.base, options.allow, private_hosts=options.allow_private_hosts)
        self._http = HttpClient(
            self._allowed.check_address,
            proxies=Proxies(self._allowed.may_use_proxy),
            timeout_s=options.timeout_s,
            max_bytes=options.max_bytes,
        )
        self._credential_fault: str | None = None
        """What to do about credentials that a bucket has refused, once one has."""

    def fetch(self, source: Source) -> bytes:
        """The encoded medium. `source` is a URI, a path (relative ones start at the manifest) or the bytes themselves.

        A list of frames becomes one medium (`frame_list.py`).

        Raises MediaNotFound, AccessDenied, FetchTimeout, MediaTooLarge, or FetchError for anything else;
        CredentialError when a bucket refuses the job's credentials altogether.
        """
        if isinstance(source, tuple):
            return pack_frames(self._fetch_frames(source))
        if isinstance(source, bytes):
            return self._limited(source, "the medium in the row")
        source = self._resolved(source)
        scheme = scheme_of(source)
        if scheme == "data":
            return self._limited(data_uri_content(source), "the data: URI")
        if not scheme:
            return self._retrying(lambda: self._read_file(source)[0])
        if scheme in WEB_SCHEMES:
            return self._retrying(lambda: self._http.get(source)[2])
        return self._retrying(lambda: self._read_object(source))

    def _fetch_frames(self, sources: Sequence[str | bytes]) -> list[bytes]:
        """Each frame; refuses the list as soon as its frames together are too large."""
        frames: list[bytes] = []
        num_bytes = 0
        for source in sources:
            frames.append(self.fetch(source))
            num_bytes += len(frames[-1])
            if num_bytes > self._options.max_bytes:
                what = f"the list of {len(sources)} frames"
                raise self._too_large(what, f"{num_bytes:,} bytes in its first {len(frames)}")
        return frames

    def open(self, source: str | bytes) -> RangedSource:
        """The same medium, of which parts are read as they are asked for; what `fetch` refuses is refused here too.

        Where its place can't give parts (a data: URI, a server without ranges or sizes), it is fetched whole.
        """
        source = source if isinstance(source, bytes) else self._resolved(source)
        if isinstance(source, bytes) or scheme_of(source) == "data":
            return _whole(self.fetch(source))
        if not scheme_of(source):
            opened = self._retrying(lambda: self._open_file(source))
        elif scheme_of(source) in WEB_SCHEMES:
            opened = self._retrying(lambda: self._open_web(source))
        else:
            opened = self._retrying(lambda: self._open_object(source))
        return replace(opened, read=lambda start, stop: self._retrying(lambda: opened.read(start, stop)))

    def _resolved(self, source: str) -> str:
        """The source with the manifest's place before it, if that is not on disk and the source is relative."""
        base = self._options.base
        if header := base64_header(source):
            raise MediaNotFound(f"{source[:24]}... is the content of a file, not its place: write {header} before it")
        if scheme_of(source) or source.lower().startswith("file:") or not scheme_of(base):
            return source
        if scheme_of(base) in WEB_SCHEMES:
            return urljoin(base.rstrip("/") + "/", quote(source, safe="/%?=&"))
        if source.startswith("/"):
            raise AccessDenied(
                f"{shown(source)} is an absolute path, but the manifest is in {shown(base)}: give a path relative to "
                "it, or a whole URI"
            )
        return base + "/" + source  # a base that ends in a slash has a key with two of them

    def _limited(self, data: bytes, what: str) -> bytes:
        if len(data) > self._options.max_bytes:
            raise self._too_large(what, f"{len(data):,} bytes")
        return data

    def _too_large(self, what: str, size: str) -> MediaTooLarge:
        return MediaTooLarge(f"{what} has {size}; at most {self._options.max_bytes:,} are fetched (media.max_bytes)")

    def _retrying(self, attempt: Callable[[], T]) -> T:
        return with_retries(attempt, self._options.retries + 1)

    # -- files ---------------------------------------------------------------------------------------------------------

    def _read_file(self, source: str, start: int = 0, stop: int | None = None) -> tuple[bytes, int]:
        """(bytes [start, stop), size of the whole file)."""
        if "\x00" in local_path(source) or any("\ud800" <= letter <= "\udfff" for letter in source):
            raise MediaNotFound(f"{source[:120]!r} is no path: it holds characters that no file name can have")
        path = self._allowed.file(source)
        try:
            # Already resolved, so a link here appeared after the check. A pipe or device must not block the open.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise AccessDenied(f"{shown(source)} is not a regular file")
                if status.st_size > self._options.max_bytes:
                    raise self._too_large(shown(source), f"{status.st_size:,} bytes")
                with open(descriptor, "rb", buffering=0, closefd=False) as file:
                    file.seek(start)
                    return file.read(-1 if stop is None else stop - start), status.st_size
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._translated(error, source) from error

    def _open_file(self, source: str) -> RangedSource:
        return RangedSource(
            self._read_file(source, 0, 0)[1], lambda start, stop: self._read_file(source, start, stop)[0]
        )

    # -- buckets -------------------------------------------------------------------------------------------------------

    def _read_object(self, source: str) -> bytes:
        limit = self._options.max_bytes
        # One ranged request, with a byte more than allowed, instead of one for the size and one for the content.
        data = self._ask_bucket(source, lambda fs, uri: fs.cat_file(uri, start=0, end=limit + 1))
        if len(data) > limit:
            raise self._too_large(shown(source), f"more than {limit:,} bytes")
        return bytes(data)

    def _open_object(self, source: str) -> RangedSource:
        entry = self._ask_bucket(source, lambda fs, uri: fs.info(uri))
        if entry.get("type") == "directory":
            raise MediaNotFound(f"{shown(source)} is a folder, not an object")
        if entry.get("size") is None:
            return _whole(self._read_object(source))
        if int(entry["size"]) > self._options.max_bytes:
            raise self._too_large(shown(source), f"{int(entry['size']):,} bytes")

        def read(start: int, stop: int) -> bytes:
            return bytes(self._ask_bucket(source, lambda fs, uri: fs.cat_file(uri, start=start, end=stop)))

        return RangedSource(int(entry["size"]), read)

    def _ask_bucket(self, source: str, question: Callable[[Any, str], T]) -> T:
        """`question(file system, normal URI)` within the time limit; the bucket's exceptions as ours."""
        uri = self._allowed.bucket_object(source)
        self._check_credentials(source)

        def answer() -> T:
            try:
                return question(self._file_system(scheme_of(uri)), uri)
            except Exception as error:
                # Noted in this thread, since a client may take longer to find out than the time limit: Google's tries
                # for half a minute to renew a token.
                self._credential_fault = self._credential_fault or credential_fault(error)
                raise

        try:
            return within(answer, self._options.timeout_s)
        except Exception as error:  # every fsspec implementation has exceptions of its own
            self._check_credentials(source, error)
            raise self._translated(error, source) from error

    def _check_credentials(self, source: str, error: Exception | None = None) -> None:
        """End the job if a bucket has refused its credentials: the other rows' media would fail alike."""
        if self._credential_fault is not None:
            raise CredentialError(f"{shown(source)}: {self._credential_fault}") from error

    def _file_system(self, scheme: str) -> Any:
        """Opened by its scheme alone, since fsspec takes a `::` in a row's URI for a way to other file systems."""
        import fsspec

        options = self._options.storage_options
        known = fsspec.available_protocols()
        by_scheme = {scheme_of(f"{key}://"): value for key, value in options.items() if key in known}
        found = by_scheme.get(scheme, {}) if by_scheme else options
        if scheme == "s3":  # whose client has ten connections otherwise, which a few slow objects would take
            connections = {"max_pool_connections": MAX_FETCHES, **found.get("config_kwargs", {})}
            found = {**found, "config_kwargs": connections}
        if scheme in _OF_ONE_HOST:
            raise storage.StorageError(
                f"media at {scheme}:// can't be fetched; copy them to disk, a bucket (s3://, gs://) or a web server"
            )
        return storage.file_system(f"{scheme}://", found)[0]

    # -- the web -------------------------------------------------------------------------------------------------------

    def _open_web(self, source: str) -> RangedSource:
        status, headers, first = self._http.get(source, (0, FIRST_BYTES))
        if status == 206:
            size = headers.get("Content-Range", "").rpartition("/")[2]
        else:
            size = str(len(first)) if len(first) < FIRST_BYTES else headers.get("Content-Length", "")
        if not size.isdigit():
            return _whole(self._http.get(source)[2])
        if int(size) > self._options.max_bytes:
            raise self._too_large(shown(source), f"{int(size):,} bytes")
        return RangedSource(int(size), lambda start, stop: self._http.get(source, (start, stop))[2], first)

    def _translated(self, error: Exception, source: str) -> Exception:
        """The exception of a file system or bucket as ours."""
        kind: type[FetchError] = FetchError
        text = getattr(error, "strerror", None) or first_line(error)
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            kind, text = MediaNotFound, "no such object" if scheme_of(source) else "no such file"
            text += missing_hint(source)
        elif isinstance(error, IsADirectoryError):
            kind, text = MediaNotFound, "it is a folder"
        elif isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.ELOOP:
            kind = AccessDenied
        elif isinstance(error, TimeoutError):
            kind, text = FetchTimeout, f"no answer within {self._options.timeout_s:g} s"
        translated = kind(f"{shown(source)}: {text}")
        return TransientError(translated) if is_transient(error) else translated


def _whole(data: bytes) -> RangedSource:
    return RangedSource(len(data), lambda start, stop: data[start:stop], data)


def within(work: Callable[[], T], seconds: float) -> T:
    """The result of blocking work. Raises TimeoutError; the thread of a source that hangs is left behind."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="fetch").start()
    return result.result(seconds)
