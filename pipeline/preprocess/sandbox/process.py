"""The actor's handle on the decoder process: it sends requests, enforces deadline and memory limit, and replaces it.

Knows processes, time and memory; not rows, nor what requests and answers hold. Needs Linux or macOS; the memory limit
is enforced on Linux only.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection

from pipeline.errors import DecoderCrash, MediaMemoryError, MediaTimeout, ResourceError
from pipeline.preprocess.limits import MIB, MediaOptions
from pipeline.preprocess.sandbox import fork_server
from pipeline.preprocess.sandbox.protocol import Answer, DecodeRequest, read_progress
from pipeline.preprocess.sandbox.shared_memory import Segment

# Memory that a decoder keeps between media instead of returning it to the system.
_REUSED_BYTES = 256 * MIB
# How often a decoder's time and memory are checked; ordinary images are done before the first check.
_CHECK_INTERVAL_S = 0.05
_START_TIMEOUT_S = 120.0
_MAX_ANSWER_BYTES = 4 * MIB
_READ_BYTES = 256 * 1024


class DecoderProcess:
    """A decoder that is started on first use, and replaced when it ends or must be killed."""

    def __init__(self, options: MediaOptions, source: Segment, outputs: Sequence[Segment]) -> None:
        self.options = options
        self.pid = 0
        """The present decoder's process id, 0 before the first use."""
        self._input = source
        self._connection: Connection | None = None
        self._received = b""
        """The beginning of an answer."""
        self._idle_bytes = 0
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_START_TIMEOUT_S)
        segments = [segment.descriptor for segment in (source, *outputs)]
        call = f"main({theirs.fileno()}, {segments}, {options.resize!r})"
        with theirs:
            self._fork_server = subprocess.Popen(
                [sys.executable, "-c", f"from {fork_server.__name__} import main; {call}"],
                pass_fds=[theirs.fileno(), *segments],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt from the keyboard is the job's to handle
            )
        self._finalizer = weakref.finalize(self, _end_fork_server, self._fork_server, self._control)

    def send(self, request: DecodeRequest) -> None:
        """Hand over a request. Raises ResourceError if no decoder can be started."""
        if self._connection is None:
            self._replace()
        assert self._connection is not None
        # If the decoder died since the last request, `receive` notices.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send(request)

    def receive(self) -> list[Answer]:
        """The next answers to the request. Raises MediaTimeout, MediaMemoryError or DecoderCrash after replacing it."""
        assert self._connection is not None
        try:
            # In pieces, since a decoder may also stop in the middle of an answer.
            while b"\n" not in self._received:
                if self._connection.poll(_CHECK_INTERVAL_S):
                    part = os.read(self._connection.fileno(), _READ_BYTES)
                    if not part or len(self._received) > _MAX_ANSWER_BYTES:
                        raise EOFError
                    self._received += part
                    if b"\n" in part:
                        break
                else:
                    self._check_memory()
                self._check_time()
            line, _, self._received = self._received.partition(b"\n")
            answers: list[Answer] = json.loads(line)
        except (EOFError, OSError, ValueError):
            raise DecoderCrash(_describe_exit(self._replace())) from None
        return answers

    def close(self) -> None:
        """End the decoder and the fork server."""
        if self._connection is not None:
            self._connection.close()
        self._finalizer()

    def _check_time(self) -> None:
        _, started = read_progress(self._input)
        if time.monotonic() - started > self.options.timeout_s:
            self._kill()
            raise MediaTimeout(
                f"decoding took longer than {self.options.timeout_s:g} s and was stopped (media.timeout_s)"
            )

    def _check_memory(self) -> None:
        limit_mb = self.options.memory_limit_mb
        used_mb = (private_bytes(self.pid) - self._idle_bytes) / MIB
        if limit_mb is not None and used_mb > limit_mb:
            self._kill()
            raise MediaMemoryError(
                f"decoding took {used_mb:,.0f} MiB of memory and was stopped; at most {limit_mb:,} are allowed "
                "(media.memory_limit_mb)"
            )

    def _kill(self) -> None:
        # The fork server has not waited for the decoder yet, so the process id can't belong to another process.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._replace()

    def _replace(self) -> int:
        """Start a new decoder; the exit code of the one before, or minus the signal that ended it."""
        if self._connection is not None:
            self._connection.close()
        self._connection, theirs = multiprocessing.Pipe()
        self._received = b""
        try:
            with theirs:
                socket.send_fds(self._control, [b"f"], [theirs.fileno()])
            exit_code, self.pid = fork_server.REPLY.unpack(self._control.recv(fork_server.REPLY.size))
        except (OSError, struct.error) as error:
            raise ResourceError(
                f"no decoder process can be started with {sys.executable} (exit code {self._fork_server.poll()}): "
                "see its message above; it needs the same packages as the job"
            ) from error
        self._idle_bytes = private_bytes(self.pid)
        self._connection.send(self.options)
        return int(exit_code)


def _end_fork_server(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    control.close()  # which the fork server notices
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    """The actor's environment with its import path, one thread for each library, and memory that is kept for reuse.

    By default glibc returns every large buffer to the system, and the kernel clears it page by page for the next
    image: half the time of a 12-megapixel JPEG.
    """
    ours = {
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        **dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(_REUSED_BYTES)),
    }
    return {**os.environ, **ours}


def private_bytes(pid: int) -> int:
    """Memory that only this process uses, without files and shared segments; 0 where that can't be read."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"the decoder process ended with exit code {code} while decoding"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", perhaps by the system for want of memory" if -code == signal.SIGKILL else ""
    return f"the decoder process was ended by {name}{hint} while decoding"
