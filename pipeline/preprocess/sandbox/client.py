"""Decoding that can be killed: the actor's side of the decoder process.

Each actor has one `MediaWorker`. Encoded bytes go to its decoder, and patches come back, through memory that both
processes see; the patches are handed on where they lie, without a copy. A medium that exceeds its deadline, crashes
the decoder or outgrows its memory becomes one typed error, the decoder is replaced in milliseconds, and the row's other
media are decoded all the same.

Knows processes, deadlines and memory; not codecs (`decode.py`), nor where bytes come from (`fetch.py`). Needs Linux or
macOS; the memory limit is watched on Linux only.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np

import pipeline.errors
from pipeline.conversation import MediumKind, MediumSettings
from pipeline.errors import (
    DecoderCrash,
    MediaError,
    MediaMemoryError,
    MediaTimeout,
    MediaTooLarge,
    ResourceError,
    RowError,
)
from pipeline.preprocess.limits import MIB, MediaOptions
from pipeline.preprocess.patches import Resize, Uint8Array
from pipeline.preprocess.receipt import SeenMedium, shown_source
from pipeline.preprocess.sandbox.process import AWAIT, KILL, LENGTH_BYTES, SPAWN, MediumRequest, Progress, Request
from pipeline.preprocess.sandbox.shared_memory import Segment
from pipeline.schema import MediumReceipt

Medium: TypeAlias = tuple[MediumKind, bytes, MediumSettings, str]
"""(kind, encoded bytes, settings, source): the source is what the receipt will say."""
T = TypeVar("T")
_Read: TypeAlias = Callable[[dict[str, Any], Uint8Array, str], T]
"""Takes a medium's answer, the output's bytes and the source to what the caller gets."""

# A segment is cut to this size between uses, and all that wait to be used again together to the next.
_KEPT_BYTES = 64 * MIB
_SPARE_BYTES = 256 * MIB
# Patches up to this size are copied out rather than handed over, as are all once so many segments are held.
_COPIED_BYTES = 256 * 1024
_MAX_HELD = 128
# Memory that a decoder keeps between media instead of returning it to the system.
_REUSED_BYTES = 256 * MIB
# How often a decoder's memory is looked at; ordinary images are done before the first look.
_WATCH_INTERVAL_S = 0.05
_START_TIMEOUT_S = 120.0
_MAX_ANSWER_BYTES = 4 * MIB


class MediaWorker:
    """Decodes the media of rows, one row at a time, in a process that may be killed. Safe to share between threads."""

    def __init__(self, options: MediaOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._input = Segment.create()
        self._outputs = _Outputs()
        self._decoder = _DecoderProcess(options.resize)

    def see_media(self, media: Sequence[Medium]) -> list[SeenMedium | RowError]:
        """One result for each medium of a row, in order: what the model gets, or the error that makes an error row.

        The patches lie in shared memory, which is reused once no array looks at it any more.
        Raises ResourceError when the decoder process can't be started.
        """
        return self.see_rows([media])[0]

    def see_rows(self, rows: Sequence[Sequence[Medium]]) -> list[list[SeenMedium | RowError]]:
        """`see_media` for several rows with one hand-over to the decoder: cheaper where media are small."""
        return self._decode(rows, _seen_medium)

    def thumbnails(
        self, kind: MediumKind, data: bytes, *, max_side: int, num_frames: int = 4, source: str = "the medium"
    ) -> list[bytes]:
        """JPEGs of at most `max_side` pixels: one of an image, up to `num_frames` (an even number) of a video.

        Raises MediaError subclasses (MediaTooLarge for too many bytes), and ResourceError when the decoder process
        can't be started. `MediaOptions(resize="pil")` spares the decoder the loading of torch for images.
        """
        media: list[Medium] = [(kind, data, MediumSettings(), source)]
        ((result,),) = self._decode([media], _pictures, thumbnails=(max_side, num_frames))
        if isinstance(result, RowError):
            raise result
        return result

    def _decode(
        self, rows: Sequence[Sequence[Medium]], read: _Read[T], *, thumbnails: tuple[int, int] | None = None
    ) -> list[list[T | RowError]]:
        with self._lock:
            results: list[list[T | RowError | None]] = [[self._too_large(medium) for medium in row] for row in rows]
            while undone := [
                (row, place)
                for row, found in enumerate(results)
                for place, result in enumerate(found)
                if result is None
            ]:
                # Once, unless a medium kills the decoder: then again with those that it left undone.
                self._exchange(rows, undone, results, read, thumbnails)
            self._input.trim(_KEPT_BYTES)
            return [[result for result in found if result is not None] for found in results]

    def decoder_cpu_s(self) -> float:
        """Seconds of processor time that the present decoder has used; 0 where that can't be told."""
        return _cpu_seconds(self._decoder.pid)

    def close(self) -> None:
        """End the decoder process. Patches that were handed out stay valid."""
        with self._lock:
            self._decoder.close()
            self._input.close()
            self._outputs.close()

    def __enter__(self) -> MediaWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _too_large(self, medium: Medium) -> RowError | None:
        _, data, _, source = medium
        if len(data) <= self._options.max_bytes:
            return None
        return MediaTooLarge(
            f"{source} has {len(data):,} bytes; at most {self._options.max_bytes:,} are decoded (media.max_bytes)"
        )

    def _exchange(
        self,
        rows: Sequence[Sequence[Medium]],
        undone: Sequence[tuple[int, int]],
        results: list[list[T | RowError | None]],
        read: _Read[T],
        thumbnails: tuple[int, int] | None,
    ) -> None:
        """Have the decoder see these media; `results` gets those it finished and the one that ended it."""
        output = self._outputs.free()
        requests = self._write_input(rows, undone)
        decoder = self._decoder
        options = self._options if decoder.is_new else None
        request = Request(requests, options, output, self._outputs.forgotten(), thumbnails)
        decoder.send(request, self._input, self._outputs.segment(output))
        answers: list[dict[str, Any]] = []
        failure: MediaError | None = None
        try:
            while len(answers) < len(undone):
                answers += decoder.receive(self._options, self._input)
        except MediaError as error:
            failure = error
        used = [start + rows * columns for start, rows, columns in (a["patches"] for a in answers if "patches" in a)]
        used += [start + size for answer in answers for start, size in answer.get("thumbnails", ())]
        buffer = self._outputs.hand_out(output, max(used, default=0))
        for (row, place), answer in zip(undone, answers, strict=False):
            results[row][place] = _result(answer, buffer, rows[row][place][3], read)
        if failure is not None:
            # Answers may be fewer than media seen: those whose answer was still on its way are seen once more.
            at, _ = Progress.read(self._input)
            row, place = undone[min(max(at, len(answers)), len(undone) - 1)]
            kind, data, _, _ = rows[row][place]
            results[row][place] = type(failure)(f"{failure} ({kind} of {len(data):,} bytes)")

    def _write_input(
        self, rows: Sequence[Sequence[Medium]], undone: Sequence[tuple[int, int]]
    ) -> list[list[MediumRequest]]:
        offset = Progress.BYTES
        self._input.reserve(offset + sum(len(rows[row][place][1]) for row, place in undone))
        requests: dict[int, list[MediumRequest]] = {}
        for row, place in undone:
            kind, data, settings, _ = rows[row][place]
            self._input.map[offset : offset + len(data)] = data
            values = tuple(vars(settings).values())
            requests.setdefault(row, []).append(MediumRequest(kind, offset, len(data), values))
            offset += len(data)
        Progress.write(self._input, 0, time.monotonic())
        return list(requests.values())


class _Outputs:
    """Segments for patches. One that an array still looks at is not written to again."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}
        self._free: list[int] = []
        self._forgotten: list[int] = []
        self._count = 0

    def free(self) -> int:
        """Number of a segment that may be written to."""
        while self._free and sum(self._segments[number].size for number in self._free) > _SPARE_BYTES:
            number = self._free.pop(0)
            self._segments.pop(number).close()
            self._forgotten.append(number)
        if self._free:
            number = self._free.pop()
            self._segments[number].trim(_KEPT_BYTES)
            return number
        self._count += 1
        self._segments[self._count] = Segment.create()
        return self._count

    def segment(self, number: int) -> Segment:
        """The segment of this number."""
        return self._segments[number]

    def forgotten(self) -> tuple[int, ...]:
        """Segments that were given up since the last call."""
        given_up, self._forgotten = tuple(self._forgotten), []
        return given_up

    def hand_out(self, number: int, used: int) -> Uint8Array:
        """The segment's first `used` bytes. It becomes free when no array looks at them any more."""
        segment = self._segments[number]
        segment.refresh()
        held = len(self._segments) - len(self._free)
        if used <= _COPIED_BYTES or held > _MAX_HELD:
            # A segment takes a file descriptor in two processes: rows that are kept must not use them up.
            self._free.append(number)
            return np.frombuffer(segment.map, dtype=np.uint8, count=used).copy() if used else np.empty(0, np.uint8)
        buffer = np.frombuffer(segment.map, dtype=np.uint8, count=used)
        # list.append is atomic: this may run in whichever thread lets go of the last array.
        weakref.finalize(buffer, self._free.append, number).atexit = False
        return buffer

    def close(self) -> None:
        """Give up all segments."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
        self._free.clear()


class _DecoderProcess:
    """The nursery, and the decoder that it has forked, if any."""

    def __init__(self, resize: Resize) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._nursery = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"from pipeline.preprocess.sandbox.process import main; main({theirs.fileno()}, {resize!r})",
                ],
                pass_fds=[theirs.fileno()],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt from the keyboard is the job's to handle
            )
        self._ready = False
        self._socket: socket.socket | None = None
        self.pid = 0
        """The present decoder's process, 0 while there is none."""
        self._idle_bytes = 0
        self._known: set[int] = set()
        self._received = b""
        self._finalizer = weakref.finalize(self, _end_nursery, self._nursery, self._control)

    @property
    def is_new(self) -> bool:
        """Whether the decoder knows neither the options nor the input segment yet."""
        return self._socket is None

    def send(self, request: Request, source: Segment, output: Segment) -> None:
        """Hand rows to the decoder, after starting one if there is none."""
        descriptors: list[int] = []
        if self._socket is None:
            self._socket = self._spawn()
            descriptors.append(source.descriptor)
        if request.output not in self._known:
            descriptors.append(output.descriptor)
            self._known.add(request.output)
        self._known.difference_update(request.forget)
        body = pickle.dumps(tuple(request), protocol=pickle.HIGHEST_PROTOCOL)
        message = memoryview(len(body).to_bytes(LENGTH_BYTES, "big") + body)
        # A decoder that died since the last row is noticed when its answer does not come.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sent = socket.send_fds(self._socket, [message], descriptors)
            self._socket.sendall(message[sent:])

    def receive(self, options: MediaOptions, source: Segment) -> list[dict[str, Any]]:
        """The decoder's next answers. Raises MediaTimeout, MediaMemoryError or DecoderCrash after ending it."""
        assert self._socket is not None
        while b"\n" not in self._received:
            if not select.select([self._socket], [], [], _WATCH_INTERVAL_S)[0]:
                self._check_time(options.timeout_s, source)
                self._check_memory(options.memory_limit_mb)
                continue
            try:
                part = self._socket.recv(65536)
            except ConnectionResetError:
                part = b""
            if not part or len(self._received) > _MAX_ANSWER_BYTES:
                raise DecoderCrash(_ending(self._end(AWAIT)))
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        answers: list[dict[str, Any]] = json.loads(line)
        return answers

    def close(self) -> None:
        """End the decoder and the nursery."""
        if self._socket is not None:
            self._socket.close()
            self._socket, self.pid = None, 0
        self._finalizer()

    def _check_time(self, timeout_s: float, source: Segment) -> None:
        progress = Progress.read(source)
        # Read twice: the two numbers are not written as one.
        if time.monotonic() - progress[1] > timeout_s and progress == Progress.read(source):
            self._end(KILL)
            raise MediaTimeout(f"decoding took longer than {timeout_s:g} s and was stopped (media.timeout_s)")

    def _check_memory(self, limit_mb: int | None) -> None:
        if limit_mb is None:
            return
        used = (_private_bytes(self.pid) - self._idle_bytes) / MIB
        if used > limit_mb:
            self._end(KILL)
            raise MediaMemoryError(
                f"decoding took {used:,.0f} MiB of memory and was stopped; at most {limit_mb:,} are allowed "
                "(media.memory_limit_mb)"
            )

    def _spawn(self) -> socket.socket:
        self._await_nursery()
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [SPAWN], [theirs.fileno()])
        self.pid = self._read_number()
        self._idle_bytes = _private_bytes(self.pid)
        self._known, self._received = set(), b""
        return ours

    def _await_nursery(self) -> None:
        if self._ready:
            return
        self._control.settimeout(_START_TIMEOUT_S)
        with contextlib.suppress(TimeoutError):
            self._ready = self._control.recv(1) == b"!"
        if not self._ready:
            raise ResourceError(
                f"the decoder process did not start (exit code {self._nursery.poll()}, {sys.executable}): "
                "see its message above; it needs the same packages as the job"
            )

    def _end(self, how: bytes) -> int:
        """End the decoder; its exit code, or minus the signal that ended it."""
        assert self._socket is not None
        self._socket.close()
        self._socket, self.pid = None, 0
        self._control.sendall(how)
        return self._read_number()

    def _read_number(self) -> int:
        try:
            answer = self._control.recv(LENGTH_BYTES, socket.MSG_WAITALL)
        except OSError:
            answer = b""
        if len(answer) < LENGTH_BYTES:
            raise ResourceError(f"the process that starts decoders has ended (exit code {self._nursery.poll()})")
        return int.from_bytes(answer, "big", signed=True)


def _end_nursery(nursery: subprocess.Popen[bytes], control: socket.socket) -> None:
    control.close()  # which the nursery notices
    try:
        nursery.wait(timeout=5)
    except subprocess.TimeoutExpired:
        nursery.kill()
        nursery.wait()


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


def _private_bytes(pid: int) -> int:
    """Memory that a process has for itself, without files and shared segments; 0 where that can't be told."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _cpu_seconds(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/schedstat", "rb") as file:
            return int(file.read().split()[0]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _ending(code: int) -> str:
    if code >= 0:
        return f"the decoder process ended with exit code {code} while decoding"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", perhaps by the system for want of memory" if -code == signal.SIGKILL else ""
    return f"the decoder process was ended by {name}{hint} while decoding"


def _result(answer: dict[str, Any], buffer: Uint8Array, source: str, read: _Read[T]) -> T | RowError:
    if "error" in answer:
        name, message = answer["error"]
        kind = getattr(pipeline.errors, name, DecoderCrash)
        error: RowError = (kind if issubclass(kind, RowError) else DecoderCrash)(message)
        return error
    return read(answer, buffer, source)


def _pictures(answer: dict[str, Any], buffer: Uint8Array, source: str) -> list[bytes]:
    return [buffer[start : start + size].tobytes() for start, size in answer["thumbnails"]]


def _seen_medium(answer: dict[str, Any], buffer: Uint8Array, source: str) -> SeenMedium:
    start, rows, columns = answer["patches"]
    patches = buffer[start : start + rows * columns].reshape(rows, columns)
    receipt: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in answer["receipt"].items()
    }
    receipt["source"] = shown_source(source)
    return SeenMedium(patches, MediumReceipt(**receipt))
