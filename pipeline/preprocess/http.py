"""HTTP GET for hostile servers: addresses are checked, redirects followed, sizes and time limited.

Built on urllib3, which keeps connections open between requests. The address check sits where a connection is made, so
that it sees the very address that the connection then uses, for redirects as for first requests; a connection that is
used again has passed it. Knows URLs, addresses and status codes; not what the bytes mean, and no retries.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias
from urllib.parse import urljoin

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from pipeline.errors import AccessDenied, FetchError, FetchTimeout, MediaNotFound, MediaTooLarge, first_line
from pipeline.preprocess.uri import WEB_SCHEMES, scheme_of, shown
from pipeline.storage.retry import TRANSIENT_STATUS, TransientError

MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NOT_SATISFIABLE = 416
"""The answer to a range that begins past the end, as in an empty file."""
_HEADERS = {"User-Agent": "qwen2-vl-batch/0.1 (offline batch inference)", "Accept-Encoding": "identity"}
_CHUNK_BYTES = 256 * 1024
_MAX_HOSTS, _MAX_CONNECTIONS = 32, 16
"""Hosts with open connections, and idle connections to each."""

AddressCheck: TypeAlias = Callable[[str, int, str], None]
"""Raises AccessDenied if (host, port, address) must not be connected to."""


class HttpClient:
    """Safe to share between threads."""

    def __init__(self, check_address: AddressCheck, *, timeout_s: float, max_bytes: int) -> None:
        """`timeout_s` is for a whole `get`, however slowly the server sends; `max_bytes` for a body."""
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._pools = urllib3.PoolManager(
            _MAX_HOSTS, _HEADERS, retries=False, maxsize=_MAX_CONNECTIONS, ssl_context=_tls_context()
        )
        pools: dict[str, Any] = {
            "http": functools.partial(_Pool, check_address=check_address),
            "https": functools.partial(_TlsPool, check_address=check_address),
        }
        self._pools.pool_classes_by_scheme = pools

    def get(self, source: str, span: tuple[int, int] | None = None) -> tuple[int, Mapping[str, str], bytes]:
        """(status, headers, body) of a URL at the end of all redirects; of the body only bytes [start, stop) if given.

        The status is 2xx, or 416 for a span past the end. Raises a FetchError for anything else, or a TransientError
        with one.
        """
        url, deadline = source, time.monotonic() + self._timeout_s
        try:
            for _ in range(MAX_REDIRECTS + 1):
                status, headers, body = self._request(url, deadline, span)
                if status not in _REDIRECTS:
                    return status, headers, body
                target = headers.get("Location")
                if not target:
                    raise FetchError(f"the server answered {status} without saying where to go")
                if scheme_of(urljoin(url, target)) not in WEB_SCHEMES:
                    raise AccessDenied(
                        f"it redirects to {shown(urljoin(url, target))}; only http and https are followed"
                    )
                url = urljoin(url, target)
            raise FetchError(f"it redirects more than {MAX_REDIRECTS} times")
        except TransientError as fault:
            raise TransientError(_about(fault.error, source, url), fault.wait_s) from fault
        except FetchError as error:
            raise _about(error, source, url) from error

    def _request(self, url: str, deadline: float, span: tuple[int, int] | None) -> tuple[int, Mapping[str, str], bytes]:
        headers = _HEADERS if span is None else {**_HEADERS, "Range": f"bytes={span[0]}-{span[1] - 1}"}
        try:
            _check_url(url)
            timeout = urllib3.Timeout(total=max(0.001, deadline - time.monotonic()))
            response = self._pools.urlopen(
                "GET", url, headers=headers, timeout=timeout, redirect=False, preload_content=False
            )
            # Closing ends the connection, unless the body was read to its end, which gave it back to its pool.
            with contextlib.closing(response):
                if response.status in _REDIRECTS or (response.status == _NOT_SATISFIABLE and span is not None):
                    self._read_body(response, _CHUNK_BYTES)
                    return response.status, response.headers, b""
                self._check_response(response)
                if span is None:
                    return response.status, response.headers, self._read_body(response)
                # A server that does not know ranges sends everything from the beginning.
                skipped = 0 if response.status == 206 else span[0]
                body = self._read_body(response, skipped + span[1] - span[0])
                return response.status, response.headers, body[skipped:]
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, UnicodeError) as error:
            raise self._translated(error) from error

    def _check_response(self, response: urllib3.BaseHTTPResponse) -> None:
        status, text = response.status, f"the server answered {response.status} {response.reason}"
        if status in (404, 410):
            raise MediaNotFound(text)
        if status in (401, 403, 407, 451):
            raise AccessDenied(text)
        if status in TRANSIENT_STATUS:
            wait = response.headers.get("Retry-After", "")
            raise TransientError(FetchError(text), min(float(wait), self._timeout_s) if wait.isdigit() else 0.0)
        if not 200 <= status < 300:
            raise FetchError(text)
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding not in ("", "identity"):
            raise FetchError(f"the server sent {encoding} although it was asked for plain bytes")
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large(f"{int(length):,} bytes")

    def _read_body(self, response: urllib3.BaseHTTPResponse, num_bytes: int | None = None) -> bytes:
        """The body, or its first `num_bytes`."""
        parts, size = [], 0
        for part in response.stream(_CHUNK_BYTES, decode_content=False):
            parts.append(part)
            size += len(part)
            if size > self._max_bytes:
                raise self._too_large(f"more than {self._max_bytes:,} bytes")
            if num_bytes is not None and size >= num_bytes:
                break
        return b"".join(parts)[:num_bytes]

    def _too_large(self, size: str) -> MediaTooLarge:
        return MediaTooLarge(f"it has {size}; at most {self._max_bytes:,} are fetched (media.max_bytes)")

    def _translated(self, error: Exception) -> Exception:
        reason: BaseException = error
        while reason.args and isinstance(reason.args[-1], BaseException):  # urllib3 wraps, sometimes twice
            reason = reason.args[-1]
        if isinstance(reason, TimeoutError | urllib3.exceptions.TimeoutError):
            return TransientError(FetchTimeout(f"no answer within {self._timeout_s:g} s"))
        if isinstance(reason, ssl.SSLCertVerificationError):
            return FetchError(f"the server's certificate can't be trusted: {reason.verify_message}")
        if isinstance(reason, urllib3.exceptions.LocationValueError | UnicodeError):
            return FetchError("it is not a valid URL")
        if isinstance(reason, socket.gaierror):
            return TransientError(FetchError(f"the host can't be found ({reason.strerror})"))
        if isinstance(reason, urllib3.exceptions.IncompleteRead):
            return TransientError(FetchError(f"the connection ended {reason.expected:,} bytes too early"))
        return TransientError(FetchError(first_line(reason)))


def _about(error: Exception, source: str, url: str) -> Exception:
    through = f" (redirected to {shown(url)})" if url != source else ""
    return type(error)(f"{shown(source)}{through}: {error}")


def _check_url(url: str) -> None:
    parts = urllib3.util.parse_url(url)
    if not parts.host:
        raise FetchError("not a valid URL: it names no host")
    if parts.auth is not None:
        raise AccessDenied("a user name or password in a URL is not sent: remove it")


# ---------------------------------------------------------------------------------------------------------------------
# Connections


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """One for the process: loading the certificate store takes tens of milliseconds."""
    context = ssl.create_default_context()
    context.sslsocket_class = _TlsSocket
    return context


class _Deadline:
    """All reads of a socket together end by the deadline; its own timeout starts anew with every byte that comes."""

    deadline = 0.0

    def recv_into(self: Any, *args: Any, **options: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        self.settimeout(left)
        return int(super().recv_into(*args, **options))  # type: ignore[misc]


class _Socket(_Deadline, socket.socket):
    pass


class _TlsSocket(_Deadline, ssl.SSLSocket):
    pass


class _CheckedConnection(HTTPConnection):
    """Connects to an address that was checked, and sets the deadline of each response."""

    def __init__(self, *args: Any, check_address: AddressCheck, **options: Any) -> None:
        super().__init__(*args, **options)
        self._check_address = check_address

    def _new_conn(self) -> socket.socket:
        # Resolved once, so that a second answer can't lead elsewhere.
        found = [entry[4][:2] for entry in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)]
        for address, _ in found:
            self._check_address(self.host, self.port, str(address))
        plain = socket.create_connection((str(found[0][0]), self.port), self.timeout)
        connected = _Socket(plain.family, plain.type, plain.proto, plain.detach())
        connected.settimeout(self.timeout)
        return connected

    def getresponse(self) -> Any:
        # By now urllib3 has set the timeout to what the connection and the request have left of the time.
        if isinstance(self.sock, _Deadline) and self.timeout is not None:
            self.sock.deadline = time.monotonic() + self.timeout
        return super().getresponse()


class _CheckedTlsConnection(_CheckedConnection, HTTPSConnection):
    """The same, spoken to by the host's name."""


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _CheckedConnection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _CheckedTlsConnection
