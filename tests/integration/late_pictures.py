"""A web server on this machine that gives one picture, as late as its user wants."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def late_pictures(picture: bytes, wait: Callable[[str], object]) -> Iterator[str]:
    """Serve the picture at every path, once `wait(path)` has returned; gives the server's URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wait(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(picture)))
            with contextlib.suppress(ConnectionError):  # whoever asked may have been ended, or lost its patience
                self.end_headers()
                self.wfile.write(picture)

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)  # its threads are daemons: none is waited for
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
