"""HTTP GET for hostile servers: addresses are checked, redirects followed, sizes and time limited.

Built on urllib3, which keeps connections open between requests. The address check sits where a connection is made, so
that it sees the very address that the connection then uses, for redirects as for first requests; a connection that is
used again has passed it. A proxy looks names up itself: there only addresses that a URL spells out are checked.
Knows URLs, addresses and status codes; not what the bytes mean, and no retries.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import http.client
import os
import re
import selectors
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias
from urllib.parse import urljoin

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from pipeline.errors import AccessDenied, FetchError, FetchTimeout, MediaNotFound, MediaTooLarge, first_line
from pipeline.preprocess.fetch.proxy import Proxies, credentials, literal_address
from pipeline.preprocess.fetch.uri import WEB_SCHEMES, scheme_of, shown
from pipeline.storage.retry import TRANSIENT_STATUS, TransientError

MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NOT_SATISFIABLE = 416
"""The answer to a range that begins past the end, as in an empty file."""
_HEADERS = {"User-Agent": "qwen2-vl-batch/0.1 (offline batch inference)", "Accept-Encoding": "identity"}
_CHUNK_BYTES = 256 * 1024
_MAX_HOSTS, _MAX_CONNECTIONS = 32, 16
"""Hosts with open connections, and idle connections to each."""
_NEXT_ADDRESS_S = 0.25
"""After this a name's next address is tried beside those that have not answered yet (RFC 8305)."""
_NO_TUNNEL = re.compile(r"Tunnel connection failed: (\d+)")

AddressCheck: TypeAlias = Callable[[str, int, str], None]
"""Raises AccessDenied if (host, port, address) must not be connected to."""


class HttpClient:
    """Safe to share between threads."""

    def __init__(self, check_address: AddressCheck, *, proxies: Proxies, timeout_s: float, max_bytes: int) -> None:
        """`timeout_s` is for a whole `get`, however slowly the server sends; `max_bytes` for a body."""
        self._check_address = check_address
        self._proxies = proxies
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._direct = self._with_checks(urllib3.PoolManager)
        self._by_proxy: dict[str, urllib3.PoolManager] = {}

    def _with_checks(self, manager: Callable[..., urllib3.PoolManager], **options: Any) -> urllib3.PoolManager:
        """A pool of connections whose addresses are checked."""
        made = manager(
            num_pools=_MAX_HOSTS,
            headers=_HEADERS,
            retries=False,
            maxsize=_MAX_CONNECTIONS,
            ssl_context=_tls_context(),
            **options,
        )
        classes: dict[str, Any] = {
            "http": functools.partial(_Pool, check_address=self._check_address),
            "https": functools.partial(_TlsPool, check_address=self._check_address),
        }
        made.pool_classes_by_scheme = classes
        return made

    def _pools_for(self, url: str) -> urllib3.PoolManager:
        """Connections to a URL's host, or to the proxy that leads there."""
        proxy = self._proxies.for_url(url)
        if proxy is None:
            return self._direct
        parts = urllib3.util.parse_url(url)
        host, port = parts.host or "", parts.port or (443 if parts.scheme == "https" else 80)
        if address := literal_address(host):
            self._check_address(host.strip("[]"), port, address)
        pools = self._by_proxy.get(proxy.url)
        if pools is None:
            pools = self._with_checks(
                urllib3.ProxyManager, proxy_url=proxy._replace(auth=None).url, proxy_headers=credentials(proxy)
            )
            pools = self._by_proxy.setdefault(proxy.url, pools)
        return pools

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
            response = self._pools_for(url).urlopen(
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
            raise self._translated(error, url) from error

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

    def _translated(self, error: Exception, url: str) -> Exception:
        reason: BaseException = error
        while reason.args and isinstance(reason.args[-1], BaseException):  # urllib3 wraps, sometimes twice
            reason = reason.args[-1]
        hint = self._proxy_hint(url)
        if isinstance(reason, TimeoutError | urllib3.exceptions.TimeoutError):
            return TransientError(FetchTimeout(f"no answer within {self._timeout_s:g} s{hint}"))
        if isinstance(reason, ssl.SSLCertVerificationError):
            return FetchError(f"the server's certificate can't be trusted: {reason.verify_message}")
        if isinstance(reason, urllib3.exceptions.LocationValueError | UnicodeError):
            return FetchError("it is not a valid URL")
        if isinstance(reason, socket.gaierror):
            return TransientError(FetchError(f"the host can't be found ({reason.strerror}){hint}"))
        if isinstance(reason, urllib3.exceptions.IncompleteRead):
            return TransientError(FetchError(f"the connection ended {reason.expected:,} bytes too early"))
        refused = _NO_TUNNEL.match(str(reason))
        if refused and int(refused[1]) not in TRANSIENT_STATUS:
            return FetchError(f"{first_line(reason)}{hint}")
        return TransientError(FetchError(f"{first_line(reason)}{hint}"))

    def _proxy_hint(self, url: str) -> str:
        """What a proxy has to do with a connection that can't be made."""
        try:
            proxy, unused = self._proxies.for_url(url), self._proxies.why_unused(url)
        except urllib3.exceptions.LocationParseError:
            return ""
        return f" (through the proxy {proxy.host}:{proxy.port})" if proxy else f" ({unused})" if unused else ""


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


def _connected(found: Sequence[tuple[Any, ...]], timeout: float) -> _Socket:
    """A socket connected to the first address that answers. Raises OSError.

    `found` is getaddrinfo's. An address that can't be reached may refuse at once or be silent for ever, as IPv6 often
    is where a name has it and the network does not.
    """
    deadline = time.monotonic() + timeout
    left = list(found)
    error: OSError = TimeoutError("no address answers")
    with contextlib.ExitStack() as others, selectors.DefaultSelector() as connecting:
        while left or connecting.get_map():
            if left:
                family, kind, protocol, _, address = left.pop(0)
                try:
                    started = others.enter_context(_Socket(family, kind, protocol))
                    started.setblocking(False)
                    if (code := started.connect_ex(address)) not in (0, errno.EINPROGRESS):
                        raise OSError(code, os.strerror(code))
                except OSError as fault:  # also where the system has no such family
                    error = fault
                    continue
                connecting.register(started, selectors.EVENT_WRITE)
            wait = deadline - time.monotonic()
            if wait <= 0:
                raise TimeoutError("no address answered in time")
            for key, _ in connecting.select(min(wait, _NEXT_ADDRESS_S) if left else wait):
                socket_ = key.fileobj
                assert isinstance(socket_, _Socket)
                connecting.unregister(socket_)
                if code := socket_.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    error = OSError(code, os.strerror(code))
                    continue
                connected = _Socket(socket_.family, socket_.type, socket_.proto, socket_.detach())
                connected.settimeout(timeout)
                connected.deadline = deadline  # for the answer of a proxy, which is read before there is a request
                return connected
    raise error


class _CheckedConnection(HTTPConnection):
    """Connects to an address that was checked, and sets the deadline of each response."""

    def __init__(self, *args: Any, check_address: AddressCheck, **options: Any) -> None:
        super().__init__(*args, **options)
        self._check_address = check_address

    def _new_conn(self) -> socket.socket:
        # Resolved once, so that a second answer can't lead elsewhere.
        found = socket.getaddrinfo(self.host.strip("[]"), self.port, type=socket.SOCK_STREAM)
        for *_, address in found:
            self._check_address(self.host, self.port, str(address[0]))
        assert isinstance(self.timeout, float)
        return _connected(found, self.timeout)

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
