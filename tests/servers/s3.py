"""A real S3 endpoint over HTTP on this machine (moto's server), with faults that tests switch on.

    with s3_server() as server:
        server.make_bucket("bucket")
        server.faults.append(Fault(503))      # the next request gets a 503, the one after it works

Knows nothing of the pipeline. Tests that import it are skipped where `moto[server]` is not installed.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")
serving = pytest.importorskip("werkzeug.serving")

CREDENTIALS = {"key": "test", "secret": "test"}


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of, or besides, an answer."""

    status: int = 0
    """Answer with this HTTP status and an S3 error document; 0 answers as usual."""
    code: str = "SlowDown"
    delay_s: float = 0.0
    """Wait before answering."""
    cut_after: int | None = None
    """Send only this many bytes of the body, then close the connection."""
    method: str = ""
    """Only requests of this method; empty: any."""

    path: str = ""
    """Only requests whose path holds this; empty: any."""
    lasting: bool = False
    """Until the test takes it away, not for one request."""

    def concerns(self, environ: dict[str, Any]) -> bool:
        return self.method in ("", environ["REQUEST_METHOD"]) and self.path in environ["PATH_INFO"]


@dataclass
class S3Server:
    """The running endpoint."""

    endpoint: str
    faults: list[Fault] = field(default_factory=list)
    """Faults still to come, each for one request."""
    requests: list[str] = field(default_factory=list)
    """Method and path of every request so far."""
    bytes_sent: int = 0
    """Of answers' bodies, so far."""

    @property
    def storage_options(self) -> dict[str, Any]:
        """For fsspec's s3 file system."""
        return {**CREDENTIALS, "endpoint_url": self.endpoint, "client_kwargs": {"region_name": "us-east-1"}}

    def client(self) -> Any:
        """A plain boto3 client, for what the pipeline never does."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=CREDENTIALS["key"],
            aws_secret_access_key=CREDENTIALS["secret"],
        )

    def make_bucket(self, name: str) -> None:
        """A bucket; the servers of one process share them."""
        self.client().create_bucket(Bucket=name)


class _FaultyApp:
    def __init__(self, app: Callable[..., Iterable[bytes]], server: S3Server) -> None:
        self._app = app
        self._server = server
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            self._server.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
            fault = next((fault for fault in self._server.faults if fault.concerns(environ)), None)
            if fault is not None and not fault.lasting:
                self._server.faults.remove(fault)
        if fault is None:
            return self._counted(environ, start_response)
        time.sleep(fault.delay_s)
        if fault.status:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = f"<Error><Code>{fault.code}</Code><Message>{fault.code}, injected</Message></Error>".encode()
            start_response(
                f"{fault.status} Injected", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))]
            )
            return [body]
        if fault.cut_after is None:
            return self._app(environ, start_response)
        return self._cut(environ, start_response, fault.cut_after)

    def _counted(self, environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        for part in self._app(environ, start_response):
            self._server.bytes_sent += len(part)
            yield part

    def _cut(self, environ: dict[str, Any], start_response: Any, count: int) -> Iterator[bytes]:
        body = b"".join(self._app(environ, start_response))
        yield body[:count]
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


def _quiet_handler() -> Any:
    return type("QuietHandler", (serving.WSGIRequestHandler,), {"log": lambda *_: None})


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """An endpoint on a free port of the loopback interface, for as long as the block lasts."""
    server = S3Server("")
    app = _FaultyApp(moto_server.DomainDispatcherApplication(moto_server.create_backend_app), server)
    wsgi = serving.make_server("127.0.0.1", 0, app, threaded=True, request_handler=_quiet_handler())
    server.endpoint = f"http://127.0.0.1:{wsgi.server_port}"
    thread = threading.Thread(target=wsgi.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        wsgi.shutdown()
        thread.join()
