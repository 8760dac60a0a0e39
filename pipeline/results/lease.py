"""One run at a time on an output folder: a lease that a dead run does not hold for ever.

The holder writes a small file and renews it; a file that has not been renewed for a while, or whose process on
this machine is gone, is taken over. A run that was taken over, since it slept for longer than that, is told so by
`check` before it writes again. Knows a path; not what the folder holds.

Of runs that begin at once one wins: on disk the file is made exclusively, and in a bucket by a conditional put where
the store has it; where it has not, the last put wins and all look again a moment later. Where two take the same dead
run's lease over all the same (in a bucket, on a network disk), the one that is told so by its next renewal stops.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline import storage
from pipeline.errors import OutputError

RENEW_S = 10.0
STALE_S = 60.0
_DOUBTFUL_S = 30.0
"""Seconds without a renewal after which a run looks again before it believes that the lease is its own."""
_SETTLE_S = 1.0
_ATTEMPTS = 10
_held: set[str] = set()
"""Tokens of this process's leases."""


class Lease:
    """Holds `path` from `acquire` (or `with`) to `release`. Raises OutputError where another run holds it."""

    def __init__(self, path: str, storage_options: storage.StorageOptions = None) -> None:
        self._path = path
        self._options = storage_options
        self._token = secrets.token_hex(8)
        self._stop = threading.Event()
        self._renewer: threading.Thread | None = None
        self._renewed = 0.0
        self._lost_to: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lease, or say who holds it."""
        _held.add(self._token)
        try:
            self._acquire()
        except BaseException:
            _held.discard(self._token)
            raise
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewer.start()

    def _acquire(self) -> None:
        for _ in range(_ATTEMPTS):
            with _one_at_a_time(self._path):
                holder = self._read()
                if holder is not None and not _is_dead(holder):
                    self._refuse(holder)
                if self._take(holder):
                    return
        raise OutputError(f"{self._path} changes hands all the time: several runs begin on this folder at once")

    def check(self) -> None:
        """Raise OutputError when another run has taken the lease over. Cheap: to be asked before every write."""
        if self._lost_to is None and time.time() - self._renewed > _DOUBTFUL_S:
            self._renew_once()  # this process has slept, or the renewals fail
        if self._lost_to is not None:
            raise OutputError(
                f"another run has taken over {storage.parent(self._path)}: {_described(self._lost_to)}, since this one "
                f"had not been heard of for {STALE_S:.0f} s (was it suspended?); it stops here, and what it published "
                "counts"
            )

    def release(self) -> None:
        """Give the lease back. Where that can't be told to the bucket, it ends by itself."""
        self._stop.set()
        if self._renewer is not None:
            self._renewer.join()
            self._renewer = None
            _held.discard(self._token)
            with contextlib.suppress(OSError):
                holder = self._read()
                if holder is not None and holder.get("token") == self._token:
                    storage.delete(self._path, self._options)

    def _refuse(self, holder: dict[str, Any]) -> None:
        age = time.time() - float(holder.get("renewed", 0))
        raise OutputError(
            f"another run is writing to {storage.parent(self._path)}: {_described(holder)}, last heard of {age:.0f} s "
            f"ago; wait for it, stop it, or choose another output.path (a dead run's lease ends after {STALE_S:.0f} s)"
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            values = json.loads(storage.read_bytes(self._path, self._options))
        except FileNotFoundError:
            return None
        except ValueError:
            values = None
        if isinstance(values, dict):
            return values
        # Just being written, or left half written: nobody knows by whom, so only its age counts.
        try:
            info = storage.file_info(self._path, self._options)
        except FileNotFoundError:
            return None
        is_old = storage.is_remote(self._path) or time.time() - int(info.version or 0) / 1e9 > STALE_S
        return {"host": "?", "pid": "?", "renewed": 0.0 if is_old else time.time()}

    def _put(self, write: Callable[[str, bytes, storage.StorageOptions], None]) -> None:
        pid, now = os.getpid(), time.time()
        holder = {"token": self._token, "host": socket.gethostname(), "pid": pid, "began": _began(pid), "renewed": now}
        write(self._path, json.dumps(holder).encode(), self._options)
        self._renewed = now

    def _take(self, dead: dict[str, Any] | None) -> bool:
        """Put the lease in its place, free or a dead run's; False when another run was faster."""
        if storage.is_remote(self._path):
            # What exists is a run's that was faster, or this one's own, if the answer to a first try was lost.
            with contextlib.suppress(FileExistsError):
                self._put(storage.create if dead is None else storage.publish)
            time.sleep(_SETTLE_S)  # not every store knows conditional puts: look whose the last one was
            holder = self._read()
            return holder is not None and holder.get("token") == self._token
        try:
            if dead is not None:
                storage.delete(self._path)
            self._put(storage.create)
        except FileExistsError:
            return False
        return True

    def _renew(self) -> None:
        while self._lost_to is None and not self._stop.wait(RENEW_S):
            self._renew_once()

    def _renew_once(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # a bucket's hiccup: the next renewal comes before it is stale
            holder = self._read()
            if holder is not None and holder.get("token") != self._token:
                self._lost_to = holder
            else:
                self._put(storage.create if holder is None else storage.publish)


@contextlib.contextmanager
def _one_at_a_time(path: str) -> Iterator[None]:
    """Alone among this machine's runs that look whether a folder's lease is a dead run's."""
    with contextlib.ExitStack() as stack:
        if not storage.is_remote(path):
            descriptor = os.open(storage.local_path(storage.parent(path)), os.O_RDONLY)
            stack.callback(os.close, descriptor)
            with contextlib.suppress(OSError):  # some network disks can't; there a renewal finds out
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _described(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _is_dead(holder: dict[str, Any]) -> bool:
    if time.time() - float(holder.get("renewed", 0)) > STALE_S:
        return True
    if holder.get("host") != socket.gethostname():
        return False
    try:
        pid = int(holder["pid"])
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, ValueError):
        return False
    if pid == os.getpid():  # a container that was started again has its name and numbers from before
        return holder.get("token") not in _held
    then, now = holder.get("began"), _began(pid)
    return None not in (then, now) and then != now


def _began(pid: int) -> str | None:
    """When a process of this machine began, to tell it from an earlier one of the same number; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The name in brackets may hold anything; the 22nd field is the start, in ticks since the machine's.
        return f"{boot}/{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None
