"""One run at a time on an output folder: a lease that expires when its run dies.

The holder writes a small file and renews it. It is taken over when its process on this machine has ended, or when it
was not renewed for STALE_S and is not while one looks: machines' clocks differ, so a time alone proves nothing. A run
that was taken over because it was suspended finds out in `check`, before it writes again. Knows a path; not what the
folder holds.

Of several runs that start at once one wins: on disk the file is created exclusively, and in a bucket by a conditional
put where the store supports it; elsewhere the last put wins, and each run looks again a moment later. If two runs still
take over the same dead lease (in a bucket, or on a network disk without locks), one of them stops at its next renewal.
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
from typing import Any

from pipeline import storage
from pipeline.errors import OutputError

RENEW_S = 10.0
STALE_S = 60.0
_DOUBTFUL_S = 30.0
"""Seconds without a renewal after which a run looks again before it trusts its lease."""
WATCH_S = 1.5 * RENEW_S
"""In which a live run renews its lease at least once."""
_SETTLE_S = 1.0
_ATTEMPTS = 10
_held: set[str] = set()
"""Tokens of the leases that this process holds: one of its own that could not be deleted is a dead run's."""


class Lease:
    """Holds the file `path` inside a `with`. Entering raises OutputError while another run holds it."""

    def __init__(self, path: str, storage_options: storage.StorageOptions = None) -> None:
        self._path, self._options = path, storage_options
        self._token = secrets.token_hex(8)
        self._renewed = 0.0
        self._lost_to: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew_often, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        for _ in range(_ATTEMPTS):
            with self._write_errors(), _one_at_a_time(self._path):
                holder = self._read()
                if holder is not None and self._is_alive(holder):
                    age = _age(holder)
                    renewal = "and is still renewing it"
                    if abs(age) <= STALE_S:
                        renewal = f"last renewed {max(0, age):.0f} s ago by its clock"
                    raise OutputError(
                        f"another run is writing to {storage.parent(self._path)}: {_described(holder)} holds the "
                        f"lease, {renewal}; wait for it, stop it, or choose another output.path (a dead run's lease "
                        f"ends after {STALE_S:.0f} s)"
                    )
                if self._take(holder):
                    _held.add(self._token)
                    self._renewer.start()
                    return self
        raise OutputError(f"{self._path} keeps changing: several runs start on this folder at once; start one again")

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """What keeps the lease, a run's first file, from being written."""
        try:
            yield
        except OSError as error:
            hint = ""
            if isinstance(error, FileNotFoundError) and storage.is_remote(self._path):
                hint = "; make the bucket, or correct its name"
            raise OutputError(f"can't write {self._path} below output.path: {error}{hint}") from error

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._renewer.join()
        _held.discard(self._token)
        with contextlib.suppress(OSError):  # a bucket that can't be reached now: the lease expires
            if self._is_ours(self._read()):
                storage.delete(self._path, self._options)

    def check(self) -> None:
        """Raise OutputError when another run has taken the lease over. Cheap enough to call before every write."""
        if self._lost_to is None and time.time() - self._renewed > _DOUBTFUL_S:
            self._renew()  # this process was suspended, or the renewals fail
        if self._lost_to is not None:
            raise OutputError(
                f"another run has taken over {storage.parent(self._path)}: {_described(self._lost_to)}, because this "
                f"one did not renew its lease for {STALE_S:.0f} s (was it suspended?); it stops here, and the rows "
                "that it has published count"
            )

    def _read(self) -> dict[str, Any] | None:
        """Who holds the lease; `renewed` is always there."""
        with contextlib.suppress(FileNotFoundError):
            with contextlib.suppress(ValueError):
                values = json.loads(storage.read_bytes(self._path, self._options))
                if isinstance(values, dict) and isinstance(values.get("renewed"), float):
                    return values
            # Being written at the moment, or left half written: nobody knows by whom, so only its age counts. Buckets
            # show whole objects only.
            version = None if storage.is_remote(self._path) else storage.file_info(self._path).version
            return {"renewed": int(version or 0) / 1e9}
        return None

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        if _has_ended(holder):
            return False
        if abs(_age(holder)) <= STALE_S:
            return True
        time.sleep(WATCH_S)
        return self._read() not in (None, holder)

    def _is_ours(self, holder: dict[str, Any] | None) -> bool:
        return holder is not None and holder.get("token") == self._token

    def _write(self, write: Callable[[str, bytes, storage.StorageOptions], None]) -> None:
        pid, now = os.getpid(), time.time()
        holder = {"token": self._token, "host": socket.gethostname(), "pid": pid, "began": _began(pid), "renewed": now}
        write(self._path, json.dumps(holder).encode(), self._options)
        self._renewed = now

    def _take(self, dead: dict[str, Any] | None) -> bool:
        """Write the lease, which is free or a dead run's; False when another run was faster."""
        if not storage.is_remote(self._path):
            if dead is not None:
                storage.delete(self._path)
            try:
                self._write(storage.create)
            except FileExistsError:
                return False
            return True
        # What exists is that of a faster run, or this one's own when the answer to a first try was lost.
        with contextlib.suppress(FileExistsError):
            self._write(storage.create if dead is None else storage.publish)
        time.sleep(_SETTLE_S)  # not every store has conditional puts: look whose was the last one
        return self._is_ours(self._read())

    def _renew_often(self) -> None:
        while self._lost_to is None and not self._stop.wait(RENEW_S):
            self._renew()

    def _renew(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # a bucket's short failure: the next renewal is early enough
            holder = self._read()
            if holder is None or self._is_ours(holder):
                self._write(storage.create if holder is None else storage.publish)
            else:
                self._lost_to = holder


@contextlib.contextmanager
def _one_at_a_time(path: str) -> Iterator[None]:
    """Excludes this machine's other runs while one decides whether the holder of a lease on disk is dead."""
    with contextlib.ExitStack() as stack:
        if not storage.is_remote(path):
            descriptor = os.open(storage.local_path(storage.parent(path)), os.O_RDONLY)
            stack.callback(os.close, descriptor)
            with contextlib.suppress(OSError):  # some network disks have no locks; there a renewal finds out
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _described(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _age(holder: dict[str, Any]) -> float:
    """Seconds since the renewal; negative where the holder's clock is ahead."""
    return time.time() - float(holder["renewed"])


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to have been a process of this machine that has ended."""
    if holder.get("host") != socket.gethostname() or "pid" not in holder:
        return False
    if holder["pid"] == os.getpid() and holder.get("began") == _began(os.getpid()):
        return holder.get("token") not in _held
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    # A container that was started again has its name and process numbers from before.
    before, now = holder.get("began"), _began(holder["pid"])
    return None not in (before, now) and before != now


def _began(pid: int) -> str | None:
    """When a process of this machine began, which identifies it where numbers are reused; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The name in brackets may hold anything; the 22nd field is the start, in ticks since the machine's.
        return f"{boot}/{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None
