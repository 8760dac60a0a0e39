"""Media to patches or thumbnails, decoded in a process that can be killed: the actor's side.

Each actor has one `MediaWorker`. Encoded bytes go to its decoder and patches come back through shared memory; patches
are handed on without a copy. A medium that exceeds its deadline, crashes the decoder or outgrows its memory becomes one
typed error, the decoder is replaced in milliseconds, and the row's other media are decoded all the same.

Knows rows, segments and errors; not processes (`process.py`), codecs, nor where bytes come from.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.errors import DecoderCrash, MediaError, MediaTooLarge, RowError, row_error_types
from pipeline.preprocess.limits import MIB, MediaOptions
from pipeline.preprocess.patches import Uint8Array
from pipeline.preprocess.receipt import SeenMedium, shown_source
from pipeline.preprocess.sandbox.process import DecoderProcess
from pipeline.preprocess.sandbox.protocol import (
    PROGRESS_BYTES,
    Answer,
    DecodeRequest,
    StoredMedium,
    read_progress,
    write_progress,
)
from pipeline.preprocess.sandbox.shared_memory import Segment
from pipeline.schema import MediumReceipt

_NUM_OUTPUTS = 64
# A segment is trimmed to this size between uses, and all unused ones together are freed above the next.
_KEPT_BYTES = 64 * MIB
_MAX_UNUSED_BYTES = 256 * MIB
# Patches up to this size are copied, so that they don't occupy a whole segment.
_COPIED_BYTES = 256 * 1024
_ERROR_TYPES = row_error_types()


class MediumFile(NamedTuple):
    """An encoded image or video."""

    kind: MediumKind
    data: bytes
    settings: MediumSettings
    source: str
    """What the receipt shows as its source."""


T = TypeVar("T")
_Read: TypeAlias = Callable[[Answer, Uint8Array, str], T]
"""Makes the caller's result of a medium's answer, the output's bytes and the source."""


class MediaWorker:
    """Decodes the media of rows, one request at a time, in a process that may be killed. Threads may share it."""

    def __init__(self, options: MediaOptions) -> None:
        self._lock = threading.Lock()
        self._input = Segment.create()
        self._outputs = _Outputs()
        self._decoder = DecoderProcess(options, self._input, self._outputs.segments)

    def see_rows(self, rows: Sequence[Sequence[MediumFile]]) -> list[list[SeenMedium | RowError]]:
        """For each medium of each row, in order: what the model gets, or the error that makes an error row.

        Several rows in one request are cheaper for small media. The patches lie in shared memory, which is reused once
        no array uses it. Raises ResourceError if the decoder process can't be started.
        """
        return self._decode(rows, _seen_medium)

    def thumbnails(self, kind: MediumKind, data: bytes, *, max_side: int) -> list[bytes]:
        """JPEGs of at most `max_side` pixels: one of an image, up to four of a video.

        Raises MediaError subclasses, MediaTooLarge, and ResourceError if the decoder process can't be started. With
        `MediaOptions(resize="pil")` the decoder starts without torch, which only videos need then.
        """
        media = [MediumFile(kind, data, MediumSettings(), "the medium")]
        ((result,),) = self._decode([media], _jpegs, thumbnails=max_side)
        if isinstance(result, RowError):
            raise result
        return result

    @property
    def decoder_pid(self) -> int:
        """Process id of the present decoder, 0 before the first use."""
        return self._decoder.pid

    def close(self) -> None:
        """End the decoder process. Patches that were handed out stay valid."""
        with self._lock:
            self._decoder.close()
            for segment in (self._input, *self._outputs.segments):
                segment.close()

    def __enter__(self) -> MediaWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _decode(
        self, rows: Sequence[Sequence[MediumFile]], read: _Read[T], *, thumbnails: int | None = None
    ) -> list[list[T | RowError]]:
        numbered = [(row, medium) for row, media in enumerate(rows) for medium in media]
        with self._lock:
            results: list[T | RowError | None] = [self._too_large(medium) for _, medium in numbered]
            # One request, unless a medium kills the decoder: then another with the media that it left undone.
            while undone := [index for index, result in enumerate(results) if result is None]:
                finished = self._exchange([numbered[index] for index in undone], read, thumbnails)
                for index, result in zip(undone, finished, strict=True):
                    results[index] = result
            self._input.trim(_KEPT_BYTES)
        in_order = iter(results)
        return [[result for result in itertools.islice(in_order, len(row)) if result is not None] for row in rows]

    def _too_large(self, medium: MediumFile) -> RowError | None:
        max_bytes = self._decoder.options.max_bytes
        if len(medium.data) <= max_bytes:
            return None
        return MediaTooLarge(
            f"{medium.source} has {len(medium.data):,} bytes; at most {max_bytes:,} are decoded (media.max_bytes)"
        )

    def _exchange(
        self, numbered: Sequence[tuple[int, MediumFile]], read: _Read[T], thumbnails: int | None
    ) -> list[T | RowError | None]:
        """Results of (row, medium) pairs: of those that the decoder finished, and of the one that ended it, if any."""
        groups = self._write_input(numbered)  # may fail: before an output is taken that would have to be given back
        output = self._outputs.take()
        self._decoder.send(DecodeRequest(groups, output, thumbnails))
        answers: list[Answer] = []
        failure: MediaError | None = None
        try:
            while len(answers) < len(numbered):
                answers += self._decoder.receive()
        except MediaError as error:
            failure = error
        buffer = self._outputs.hand_out(output, max(map(_end_offset, answers), default=0))
        results: list[T | RowError | None] = [None] * len(numbered)
        for index, (answer, (_, medium)) in enumerate(zip(answers, numbered, strict=False)):
            results[index] = _error(answer) or read(answer, buffer, medium.source)
        if failure is not None:
            # Media whose answer was not sent yet are decoded again.
            at = min(max(read_progress(self._input)[0], len(answers)), len(numbered) - 1)
            medium = numbered[at][1]
            results[at] = type(failure)(f"{failure} ({medium.kind} of {len(medium.data):,} bytes)")
        return results

    def _write_input(self, numbered: Sequence[tuple[int, MediumFile]]) -> list[list[StoredMedium]]:
        self._input.reserve(PROGRESS_BYTES + sum(len(medium.data) for _, medium in numbered))
        offset = PROGRESS_BYTES
        groups: list[list[StoredMedium]] = []
        for _, row in itertools.groupby(numbered, key=lambda pair: pair[0]):
            requests = []
            for _, medium in row:
                self._input.map[offset : offset + len(medium.data)] = medium.data
                requests.append(StoredMedium(medium.kind, medium.settings, offset, len(medium.data)))
                offset += len(medium.data)
            share_budget = self._decoder.options.max_visual_tokens is not None
            groups += [requests] if share_budget else [[request] for request in requests]
        write_progress(self._input, 0, time.monotonic())
        return groups


class _Outputs:
    """Segments for patches. One that an array still uses is not written to."""

    def __init__(self) -> None:
        self.segments = [Segment.create() for _ in range(_NUM_OUTPUTS)]
        self._unused = list(range(_NUM_OUTPUTS))

    def take(self) -> int:
        """Number of a segment that may be written to."""
        number = self._unused.pop()
        self.segments[number].trim(_KEPT_BYTES)
        unused = [self.segments[other] for other in self._unused]
        if sum(segment.size for segment in unused) > _MAX_UNUSED_BYTES:
            for segment in unused:
                segment.trim(0)
        return number

    def hand_out(self, number: int, used: int) -> Uint8Array:
        """The segment's first `used` bytes. The segment can be taken again once no array uses them."""
        segment = self.segments[number]
        segment.refresh()
        buffer = np.frombuffer(segment.map, dtype=np.uint8, count=used) if used else np.empty(0, np.uint8)
        if used <= _COPIED_BYTES or not self._unused:
            self._unused.append(number)
            return buffer.copy()
        # list.append is atomic: this may run in whichever thread drops the last array.
        weakref.finalize(buffer, self._unused.append, number).atexit = False
        return buffer


def _end_offset(answer: Answer) -> int:
    if "patches" in answer:
        start, rows, columns = answer["patches"]
        return start + rows * columns
    return max((start + size for start, size in answer.get("thumbnails", ())), default=0)


def _error(answer: Answer) -> RowError | None:
    if "error" not in answer:
        return None
    name, message = answer["error"]
    return _ERROR_TYPES.get(name, DecoderCrash)(message)


def _jpegs(answer: Answer, buffer: Uint8Array, source: str) -> list[bytes]:
    return [buffer[start : start + size].tobytes() for start, size in answer["thumbnails"]]


def _seen_medium(answer: Answer, buffer: Uint8Array, source: str) -> SeenMedium:
    start, rows, columns = answer["patches"]
    patches = buffer[start : start + rows * columns].reshape(rows, columns)
    receipt: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in answer["receipt"].items()
    }
    receipt["source"] = shown_source(source)
    return SeenMedium(patches, MediumReceipt(**receipt), tuple(answer["prompt_seconds"]), answer["seconds_per_step"])
