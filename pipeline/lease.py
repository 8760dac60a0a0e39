"""One run at a time on an output folder: a lease that a dead run does not hold for ever.

The holder writes a small file and renews it; a file that has not been renewed for a while, or whose process on
this machine is gone, is taken over. Knows a path; not what the folder holds.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from types import TracebackType
from typing import Any

from pipeline import storage
from pipeline.errors import OutputError

RENEW_S = 10.0
STALE_S = 60.0
_SETTLE_S = 1.0


class Lease:
    """Holds `path` from `acquire` (or `with`) to `release`. Raises OutputError where another run holds it."""

    def __init__(self, path: str, storage_options: storage.StorageOptions = None) -> None:
        self._path = path
        self._options = storage_options
        self._token = secrets.token_hex(8)
        self._stop = threading.Event()
        self._renewer: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lease, or say who holds it."""
        holder = self._read()
        if holder is not None and not _is_dead(holder):
            self._refuse(holder)
        self._write()
        if storage.is_remote(self._path):
            time.sleep(_SETTLE_S)  # a bucket's last write wins: look whether it was ours
        holder = self._read()
        if holder is not None and holder.get("token") != self._token:
            self._refuse(holder)
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewer.start()

    def release(self) -> None:
        """Give the lease back."""
        self._stop.set()
        if self._renewer is not None:
            self._renewer.join()
            self._renewer = None
            holder = self._read()
            if holder is not None and holder.get("token") == self._token:
                storage.delete(self._path, self._options)

    def _refuse(self, holder: dict[str, Any]) -> None:
        age = time.time() - float(holder.get("renewed", 0))
        raise OutputError(
            f"another run is writing to {storage.parent(self._path)}: process {holder.get('pid')} on "
            f"{holder.get('host')}, last heard of {age:.0f} s ago; wait for it, stop it, or choose another output.path "
            f"(a dead run's lease ends after {STALE_S:.0f} s)"
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            values = json.loads(storage.read_bytes(self._path, self._options))
        except (FileNotFoundError, ValueError):
            return None
        return values if isinstance(values, dict) else None

    def _write(self) -> None:
        holder = {"token": self._token, "host": socket.gethostname(), "pid": os.getpid(), "renewed": time.time()}
        storage.publish(self._path, json.dumps(holder).encode(), self._options)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                self._write()
            except OSError:
                continue  # a bucket's hiccup; the next renewal comes long before the lease is stale


def _is_dead(holder: dict[str, Any]) -> bool:
    if time.time() - float(holder.get("renewed", 0)) > STALE_S:
        return True
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, ValueError):
        return False
    return False
