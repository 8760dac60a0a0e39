"""A medium's bytes from wherever its row says they are: a path, a bucket, a URL, a data: URI, or the row itself.

Knows places and permissions; not what the bytes mean. Rows are data, and data may be hostile: a row must not be able
to read the machine's other files or talk to its private network. So every place is checked against the manifest's own
tree or bucket and `FetchOptions.allow`, after symbolic links, name resolution and redirects, at each step.

Every exception of the file system, fsspec and the network ends here, as a FetchError; except that credentials which
a bucket no longer takes are no row's fault and end the job.
"""

from __future__ import annotations

import base64
import binascii
import email.message
import errno
import http.client
import io
import ipaddress
import os
import posixpath
import random
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import SplitResult, quote, unquote, unquote_to_bytes, urljoin, urlsplit

from pipeline.errors import AccessDenied, CredentialError, FetchError, FetchTimeout, MediaNotFound, MediaTooLarge
from pipeline.preprocess.limits import FetchOptions
from pipeline.storage import is_transient
from pipeline.storage.credentials import credential_fault

ANYTHING = "*"
MAX_REDIRECTS = 5
USER_AGENT = "qwen2-vl-batch/0.1 (offline batch inference)"

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*):(//)?")
_WEB = ("http", "https")
_BUCKET_ALIASES = {"gcs": "gs", "s3a": "s3", "s3n": "s3"}
# The extra that brings a bucket's file system, for the message when it is missing.
_BUCKET_EXTRAS = {"s3": "s3", "gs": "gcs"}
_REDIRECTS = (301, 302, 303, 307, 308)
FIRST_BYTES = 64 * 1024
"""What is read of a medium to learn its size, where that takes reading."""
_CHUNK_BYTES = 256 * 1024
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_TRANSIENT_WORDS = re.compile(
    r"timed? ?out|throttl|slow ?down|too many requests|temporar|unavailable|internal ?error|connection|reset by peer"
    r"|broken pipe|\b(429|500|502|503|504)\b",
    re.IGNORECASE,
)
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.25, 8.0

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


class _Transient(Exception):
    """A fault that may pass; carries the error to raise when it doesn't, and the wait a server asked for."""

    def __init__(self, error: FetchError, wait_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait_s = wait_s


class Fetcher:
    """Fetches media for the rows of one manifest. Safe to share between threads."""

    def __init__(self, options: FetchOptions) -> None:
        self._options = options
        self._base_scheme = _scheme(options.base)
        self._anything = ANYTHING in options.allow
        roots = [entry for entry in options.allow if entry != ANYTHING]
        self._hosts = frozenset(_host_of(entry) for entry in roots if _is_host(entry))
        self._folders = tuple(_real(_local_path(entry)) for entry in roots if _is_folder(entry))
        self._buckets = tuple(_normal_bucket(entry) for entry in roots if _is_bucket(entry))
        if self._base_scheme in ("", "file"):
            self._base_folder = _local_path(options.base) or "."
            self._folders = (_real(self._base_folder), *self._folders)
        elif self._base_scheme not in _WEB:
            self._buckets = (_bucket_root(options.base), *self._buckets)
        self._file_systems: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._refused: str | None = None
        """What to do about credentials that a bucket has refused, once one has."""

    def fetch(self, source: str | bytes) -> bytes:
        """The encoded medium. `source` is a URI, a path (relative ones start at the manifest) or the bytes themselves.

        Raises MediaNotFound, AccessDenied, FetchTimeout, MediaTooLarge, or FetchError for anything else;
        CredentialError when a bucket refuses the job's credentials altogether.
        """
        if isinstance(source, bytes):
            return self._limited(source, "the medium in the row")
        scheme = _scheme(source)
        if scheme == "data":
            return self._limited(_data_uri(source), "the data: URI")
        if not scheme and self._base_scheme not in ("", "file"):
            source = self._join(source)
            scheme = _scheme(source)
        if scheme in ("", "file"):
            return self._read_local(source)
        if scheme in _WEB:
            return self._retrying(lambda: self._read_web(source), source)
        return self._retrying(lambda: self._read_bucket(source), source)

    def open(self, source: str | bytes) -> RangedSource:
        """The same medium, of which parts are read as they are asked for; what `fetch` refuses is refused here too.

        Where its place can't give parts (a data: URI, a server without ranges or sizes), it is fetched whole.
        """
        scheme = "" if isinstance(source, bytes) else _scheme(source)
        if isinstance(source, bytes) or scheme == "data":
            return _whole(self.fetch(source))
        if not scheme and self._base_scheme not in ("", "file"):
            source = self._join(source)
            scheme = _scheme(source)
        if scheme in ("", "file"):
            return self._open_local(source)
        if scheme in _WEB:
            return self._retrying(lambda: self._open_web(source), source)
        return self._retrying(lambda: self._open_bucket(source), source)

    def _join(self, path: str) -> str:
        base = self._options.base
        if self._base_scheme in _WEB:
            return urljoin(base.rstrip("/") + "/", quote(path, safe="/%?=&"))
        if path.startswith("/"):
            raise AccessDenied(
                f"{_shown(path)} is an absolute path, but the manifest is in {_shown(base)}: give a path relative to "
                "it, or a whole URI"
            )
        return base.rstrip("/") + "/" + path

    def _limited(self, data: bytes, what: str) -> bytes:
        if len(data) > self._options.max_bytes:
            raise self._too_large(what, f"{len(data):,} bytes")
        return data

    def _too_large(self, what: str, size: str) -> MediaTooLarge:
        return MediaTooLarge(f"{what} has {size}; at most {self._options.max_bytes:,} are fetched (media.max_bytes)")

    # -- files ---------------------------------------------------------------------------------------------------------

    def _read_local(self, source: str) -> bytes:
        descriptor, _ = self._local_file(source)
        with open(descriptor, "rb", buffering=0) as file:
            try:
                return file.read()
            except OSError as error:
                raise _file_error(error, source) from error

    def _open_local(self, source: str) -> RangedSource:
        descriptor, size = self._local_file(source)
        os.close(descriptor)

        def read(start: int, stop: int) -> bytes:
            descriptor, _ = self._local_file(source)
            try:
                return os.pread(descriptor, stop - start, start)
            except OSError as error:
                raise _file_error(error, source) from error
            finally:
                os.close(descriptor)

        return RangedSource(size, read)

    def _local_file(self, source: str) -> tuple[int, int]:
        """(descriptor, size in bytes) of a file that rows may read."""
        path = _local_path(source)
        if "\x00" in path or any("\ud800" <= letter <= "\udfff" for letter in path):
            raise MediaNotFound(f"{source[:120]!r} is no path: it holds characters that no file name can have")
        if not os.path.isabs(path):
            if self._base_scheme not in ("", "file"):
                raise AccessDenied(f"{_shown(source)}: the manifest is not on this machine's disk")
            path = os.path.join(self._base_folder, path)
        real = _real(path)
        if not self._anything and not any(_below(real, folder) for folder in self._folders):
            through = f" (through a symbolic link: {real})" if real != os.path.abspath(path) else ""
            raise AccessDenied(
                f"{_shown(source)} is outside the folders that rows may read{through}: "
                f"{', '.join(self._folders) or 'none'}; add its folder to input.allow"
            )
        try:
            # Already resolved, so a link here appeared after the check. A pipe or device must not block the open.
            descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _file_error(error, source) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise AccessDenied(f"{_shown(source)} is not a regular file")
        if status.st_size > self._options.max_bytes:
            os.close(descriptor)
            raise self._too_large(_shown(source), f"{status.st_size:,} bytes")
        return descriptor, status.st_size

    # -- buckets -------------------------------------------------------------------------------------------------------

    def _read_bucket(self, source: str) -> bytes:
        file_system, location = self._bucket_object(source)
        limit = self._options.max_bytes
        # One ranged request, with a byte more than allowed, instead of one for the size and one for the content.
        data = self._asked(lambda: file_system.cat_file(location, start=0, end=limit + 1), source)
        if len(data) > limit:
            raise self._too_large(_shown(source), f"more than {limit:,} bytes")
        return bytes(data)

    def _open_bucket(self, source: str) -> RangedSource:
        file_system, location = self._bucket_object(source)
        entry = self._asked(lambda: file_system.info(location), source)
        if entry.get("type") == "directory":
            raise MediaNotFound(f"{_shown(source)} is a folder, not an object")
        if entry.get("size") is None:
            return _whole(self._read_bucket(source))
        size = int(entry["size"])
        if size > self._options.max_bytes:
            raise self._too_large(_shown(source), f"{size:,} bytes")

        def read(start: int, stop: int) -> bytes:
            return self._retrying(
                lambda: bytes(self._asked(lambda: file_system.cat_file(location, start=start, end=stop), source)),
                source,
            )

        return RangedSource(size, read)

    def _asked(self, question: Callable[[], T], source: str) -> T:
        """The bucket's answer, within the time limit; its exceptions as ours."""
        self._check_credentials(source)
        try:
            return _within(lambda: self._watched(question), self._options.timeout_s, source)
        except FetchError:
            raise
        except Exception as error:  # every fsspec implementation has exceptions of its own
            self._check_credentials(source, error)
            raise _bucket_error(error, source) from error

    def _watched(self, question: Callable[[], T]) -> T:
        """The answer. A refusal is noted here, since a client may take longer over it than anybody waits: Google's
        tries for half a minute to renew a token."""
        try:
            return question()
        except Exception as error:
            self._refused = self._refused or credential_fault(error)
            raise

    def _check_credentials(self, source: str, error: Exception | None = None) -> None:
        """End the job where a bucket has refused its credentials: the other rows' media would fail alike."""
        if self._refused is not None:
            raise CredentialError(f"{_shown(source)}: {self._refused}") from error

    def _bucket_object(self, source: str) -> tuple[Any, str]:
        """(file system, location) of an object that rows may read."""
        location = _normal_bucket(source)
        if not self._anything and not any(_below(location, bucket) for bucket in self._buckets):
            raise AccessDenied(
                f"{_shown(source)} is outside the buckets that rows may read: {', '.join(self._buckets) or 'none'}; "
                "add its bucket or prefix to input.allow"
            )
        return self._file_system(_scheme(source)), location

    def _file_system(self, scheme: str) -> Any:
        with self._lock:
            if scheme not in self._file_systems:
                self._file_systems[scheme] = self._open_file_system(scheme)
            return self._file_systems[scheme]

    def _open_file_system(self, scheme: str) -> Any:
        import fsspec

        options: Mapping[str, Any] = self._options.storage_options
        if isinstance(options.get(scheme), Mapping):
            options = options[scheme]
        elif any(isinstance(value, Mapping) and key in _known_protocols() for key, value in options.items()):
            options = {}  # sorted by protocol, and this one has none
        try:
            return fsspec.filesystem(scheme, **options)
        except ImportError as error:
            extra = _BUCKET_EXTRAS.get(_BUCKET_ALIASES.get(scheme, scheme))
            install = f"pip install 'qwen2-vl-batch[{extra}]'" if extra else "install its fsspec package"
            raise FetchError(f"{scheme}:// needs a package that is not installed ({error}): {install}") from error
        except Exception as error:
            fault = credential_fault(error)
            if fault is not None:
                raise CredentialError(f"{scheme}://: {fault}") from error
            raise FetchError(f"{scheme}:// can't be opened: {_first_line(error)}") from error

    # -- the web -------------------------------------------------------------------------------------------------------

    def _read_web(self, source: str) -> bytes:
        return self._ask_web(source, None)[2]

    def _open_web(self, source: str) -> RangedSource:
        status, headers, first = self._ask_web(source, (0, FIRST_BYTES))
        if status == 206:
            size = headers.get("Content-Range", "").rpartition("/")[2]
        else:
            size = str(len(first)) if len(first) < FIRST_BYTES else headers.get("Content-Length", "")
        if not size.isdigit():
            return _whole(self._read_web(source))
        if int(size) > self._options.max_bytes:
            raise self._too_large(_shown(source), f"{int(size):,} bytes")

        def read(start: int, stop: int) -> bytes:
            return self._retrying(lambda: self._ask_web(source, (start, stop))[2], source)

        return RangedSource(int(size), read, first)

    def _ask_web(self, source: str, span: tuple[int, int] | None) -> tuple[int, email.message.Message, bytes]:
        """(status, headers, body) at the end of all redirects; of the body only the bytes [start, stop) if given."""
        deadline = time.monotonic() + self._options.timeout_s
        url = source
        for _ in range(MAX_REDIRECTS + 1):
            status, headers, body = self._request(url, source, deadline, span)
            if status not in _REDIRECTS:
                return status, headers, body
            target = headers.get("Location")
            if not target:
                raise FetchError(f"{_shown(source)}: the server answered {status} without saying where to go")
            url = urljoin(url, target)
            if _scheme(url) not in _WEB:
                raise AccessDenied(f"{_shown(source)} redirects to {_shown(url)}; only http and https are followed")
        raise FetchError(f"{_shown(source)} redirects more than {MAX_REDIRECTS} times")

    def _request(
        self, url: str, source: str, deadline: float, span: tuple[int, int] | None
    ) -> tuple[int, email.message.Message, bytes]:
        parts = _split(url, source)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        connection: http.client.HTTPConnection | None = None
        try:
            address = self._address(host, port, source, url)
            connection = _connect(parts.scheme, host, port, address, _left(deadline, source))
            path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (
                "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?") if parts.query else ""
            )
            headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
            if span is not None:
                headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            status = response.status
            if status in _REDIRECTS or (status == 416 and span is not None):  # 416: nothing there, as in an empty file
                return status, response.headers, b""
            self._check_answer(response, source)
            if span is None:
                return status, response.headers, self._read_body(connection, response, source, deadline)
            # A server that does not know ranges sends the whole from its beginning.
            skipped = 0 if status == 206 else span[0]
            body = self._read_body(connection, response, source, deadline, most=skipped + span[1] - span[0])
            return status, response.headers, body[skipped:]
        except FetchError:
            raise
        except TimeoutError as error:
            raise _Transient(
                FetchTimeout(f"{_shown(source)}: no answer within {self._options.timeout_s:g} s")
            ) from error
        except ssl.SSLCertVerificationError as error:
            raise FetchError(
                f"{_shown(source)}: the server's certificate can't be trusted: {error.verify_message}"
            ) from error
        except http.client.InvalidURL as error:
            raise FetchError(f"{_shown(source)} is not a valid URL: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Transient(FetchError(f"{_shown(source)}: {_first_line(error)}")) from error
        finally:
            if connection is not None:
                connection.close()

    def _address(self, host: str, port: int, source: str, url: str) -> str:
        """The address to connect to: resolved once and checked, so that a second answer can't lead elsewhere."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise _Transient(
                FetchError(f"{_shown(source)}: the host {host} can't be found ({error.strerror})")
            ) from error
        except UnicodeError as error:
            raise FetchError(f"{_shown(source)}: {host!r} is not a host name") from error
        addresses = [str(entry[4][0]) for entry in found]
        if self._options.allow_private_hosts or host in self._hosts or f"{host}:{port}" in self._hosts:
            return addresses[0]
        for address in addresses:
            if not _is_public(address):
                through = f" (redirected to {_shown(url)})" if url != source else ""
                raise AccessDenied(
                    f"{_shown(source)}{through}: {host} is {address}, in a private network; set "
                    "input.allow_private_hosts to reach such hosts, or name this one in input.allow"
                )
        return addresses[0]

    def _check_answer(self, response: http.client.HTTPResponse, source: str) -> None:
        status, text = response.status, f"{_shown(source)}: the server answered {response.status} {response.reason}"
        if status in (404, 410):
            raise MediaNotFound(text)
        if status in (401, 403, 407, 451):
            raise AccessDenied(text)
        if status in _TRANSIENT_STATUS:
            raise _Transient(FetchError(text), _retry_after(response.headers.get("Retry-After")))
        if not 200 <= status < 300:
            raise FetchError(text)
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding not in ("", "identity"):
            raise FetchError(f"{_shown(source)}: the server sent {encoding} although it was asked for plain bytes")
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > self._options.max_bytes:
            raise self._too_large(_shown(source), f"{int(length):,} bytes")

    def _read_body(
        self,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        source: str,
        deadline: float,
        most: int | None = None,
    ) -> bytes:
        body = io.BytesIO()
        while True:
            if connection.sock is not None:
                connection.sock.settimeout(_left(deadline, source))
            else:
                _left(deadline, source)
            part = response.read1(_CHUNK_BYTES)
            if not part:
                break
            body.write(part)
            if body.tell() > self._options.max_bytes:
                raise self._too_large(_shown(source), f"more than {self._options.max_bytes:,} bytes")
            if most is not None and body.tell() >= most:
                return body.getvalue()[:most]
        if response.length:  # what Content-Length promised and the server did not send
            raise _Transient(FetchError(f"{_shown(source)}: the connection ended {response.length:,} bytes too early"))
        return body.getvalue()

    # -- faults that may pass ------------------------------------------------------------------------------------------

    def _retrying(self, attempt: Callable[[], T], source: str) -> T:
        for number in range(self._options.retries + 1):
            try:
                return attempt()
            except _Transient as fault:
                if number == self._options.retries:
                    kind = type(fault.error)
                    raise kind(f"{fault.error} (tried {number + 1} times)") from fault
                backoff = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2**number) * random.uniform(0.5, 1.5)
                time.sleep(max(backoff, min(fault.wait_s or 0.0, self._options.timeout_s)))
        raise AssertionError("unreachable")


def _whole(data: bytes) -> RangedSource:
    return RangedSource(len(data), lambda start, stop: data[start:stop], data)


def _within(work: Callable[[], T], seconds: float, source: str) -> T:
    """The result of blocking work, or a transient FetchTimeout; the thread of a source that hangs is left behind."""
    outcome: list[T] = []
    fault: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            fault.append(error)

    thread = threading.Thread(target=run, daemon=True, name="fetch")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise _Transient(FetchTimeout(f"{_shown(source)}: no answer within {seconds:g} s"))
    if fault:
        raise fault[0]
    return outcome[0]


def _connect(scheme: str, host: str, port: int, address: str, timeout_s: float) -> http.client.HTTPConnection:
    """A connection to one address that speaks to the host by its name."""
    raw = socket.create_connection((address, port), timeout=timeout_s)
    try:
        connection: http.client.HTTPConnection
        if scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=timeout_s)
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
            connection.sock = raw
        return connection
    except BaseException:
        raw.close()
        raise


def _left(deadline: float, source: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"{_shown(source)} is too slow")
    return left


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.split("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        # Addresses that carry an IPv4 one inside lead where that one leads.
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if inner is None and parsed in ipaddress.IPv6Network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            parsed = inner
    return parsed.is_global and not parsed.is_multicast


def _split(url: str, source: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise FetchError(f"{_shown(source)} is not a valid URL: {error}") from error
    if not parts.hostname:
        raise FetchError(f"{_shown(source)} is not a valid URL: it names no host")
    if parts.username is not None:
        raise AccessDenied(f"{_shown(source)}: a user name or password in a URL is not sent: remove it")
    return parts


def _retry_after(value: str | None) -> float | None:
    return float(value) if value and value.isdigit() else None


def _scheme(source: str) -> str:
    """The URI's scheme in lower case; empty for a plain path, also for one with a colon in its name."""
    match = _SCHEME.match(source)
    if match is None:
        return ""
    scheme = match.group(1).lower()
    return scheme if match.group(2) or scheme in ("data", "file") else ""


def _local_path(source: str) -> str:
    if _scheme(source) != "file":
        return source
    parts = urlsplit(source)
    if parts.netloc not in ("", "localhost"):
        raise AccessDenied(f"{_shown(source)} is on the host {parts.netloc}; only files of this machine can be read")
    return unquote(parts.path)


def _real(path: str) -> str:
    return os.path.realpath(path)


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _normal_bucket(uri: str) -> str:
    """A bucket URI without `..`, `.` or doubled slashes that could lead out of a prefix, and with its usual scheme."""
    scheme = _scheme(uri)
    _, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    normal = posixpath.normpath("/" + key).lstrip("/") if ".." in key.split("/") else key.rstrip("/")
    return f"{_BUCKET_ALIASES.get(scheme, scheme)}://{bucket}" + (f"/{normal}" if normal else "")


def _bucket_root(uri: str) -> str:
    """The bucket that a URI lies in; for hf:// the repository, which is what a bucket is there."""
    scheme, _, rest = _normal_bucket(uri).partition("://")
    depth = 1
    if scheme == "hf":
        depth = 3 if rest.startswith(("datasets/", "spaces/", "buckets/")) else 2
    elif scheme in ("memory", "hdfs"):  # no bucket but a tree: the folder itself
        depth = rest.count("/") + 1
    return f"{scheme}://" + "/".join(rest.split("/")[:depth])


def _is_bucket(entry: str) -> bool:
    return "://" in entry and _scheme(entry) not in ("file", *_WEB)


def _is_folder(entry: str) -> bool:
    return _scheme(entry) == "file" or ("://" not in entry and (os.sep in entry or entry in (".", "..")))


def _is_host(entry: str) -> bool:
    return _scheme(entry) in _WEB or ("://" not in entry and not _is_folder(entry))


def _host_of(entry: str) -> str:
    return urlsplit(entry if "://" in entry else f"//{entry}").netloc.rpartition("@")[2].lower().strip("[]")


def _known_protocols() -> frozenset[str]:
    import fsspec

    return frozenset(fsspec.available_protocols())


def _data_uri(source: str) -> bytes:
    header, comma, payload = source[len("data:") :].partition(",")
    if not comma:
        raise FetchError("the data: URI has no comma: expected data:[type][;base64],content")
    if not header.lower().rstrip().endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode("".join(unquote(payload).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FetchError(f"the data: URI's base64 content can't be read: {error}") from error


def _file_error(error: OSError, source: str) -> FetchError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MediaNotFound(f"{_shown(source)}: no such file")
    if isinstance(error, PermissionError) or error.errno == errno.ELOOP:
        return AccessDenied(f"{_shown(source)}: {error.strerror}")
    return FetchError(f"{_shown(source)}: {error.strerror or error}")


def _bucket_error(error: Exception, source: str) -> Exception:
    text = f"{_shown(source)}: {_first_line(error)}"
    if isinstance(error, _Transient):
        return error
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MediaNotFound(f"{_shown(source)}: no such object")
    if isinstance(error, IsADirectoryError):
        return MediaNotFound(f"{_shown(source)} is a folder, not an object")
    if isinstance(error, PermissionError):
        return AccessDenied(text)
    if isinstance(error, TimeoutError):
        return _Transient(FetchTimeout(text))
    if is_transient(error) or _TRANSIENT_WORDS.search(f"{type(error).__name__} {error}"):
        return _Transient(FetchError(text))
    return FetchError(text)


def _shown(source: str) -> str:
    """A source for messages: short, and without the signatures and passwords that URLs carry."""
    if source.startswith("data:"):
        return source[:32] + "..."
    if "://" in source:
        scheme, _, rest = source.partition("://")
        rest = rest.partition("?")[0]
        host, slash, path = rest.partition("/")
        source = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    return source if len(source) <= 200 else source[:120] + "..." + source[-60:]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
