"""The process in which media are decoded, so that a hang or a crash there harms nobody.

    actor  --Popen-->  nursery  --fork-->  decoder
                       imports codecs      decodes rows; may hang, crash or be killed

The nursery imports the codecs once and then only waits, so that a new decoder is a fork away (milliseconds) and not a
fresh import of torch (seconds). It ends when the actor ends, since its socket closes then, and takes the decoder along.

Knows how to see media and how to answer; not rows, where bytes come from, or when to give up: `worker.py` decides that.
Answers are JSON, never pickles: a decoder that a hostile file has taken over must not be able to run code in the actor.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.errors import DecoderCrash, MediaMemoryError, RowError
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.patches import Resize
from pipeline.preprocess.sandbox.shared_memory import Segment

if TYPE_CHECKING:
    from pipeline.preprocess.decode import OpenMedium
    from pipeline.preprocess.patches import Uint8Array

SPAWN, KILL, AWAIT = b"s", b"k", b"a"
LENGTH_BYTES = 4
MAX_DESCRIPTORS = 2
_ALIGNMENT = 64
_PARENT_CHECK_S = 2.0
_LAST_WORDS_S = 1.0
_ANSWER_INTERVAL_S = 0.5
_READ_BYTES = 256 * 1024


class Progress:
    """Which medium the decoder is at, and since when: the first bytes of the input segment.

    The actor learns from it whom to blame, without a message for each medium.
    """

    BYTES = 64
    _FORMAT = struct.Struct("<qd")

    @classmethod
    def write(cls, segment: Segment, number: int, started: float) -> None:
        """The medium's number in the request, and the time on this machine's monotonic clock."""
        cls._FORMAT.pack_into(segment.map, 0, number, started)

    @classmethod
    def read(cls, segment: Segment) -> tuple[int, float]:
        """(number, started) as last written."""
        number, started = cls._FORMAT.unpack_from(segment.map, 0)
        return number, started


class MediumRequest(NamedTuple):
    """A medium whose bytes lie in the input segment."""

    kind: MediumKind
    offset: int
    size: int
    settings: tuple[Any, ...]
    """The values of its MediumSettings, in order."""


class Request(NamedTuple):
    """The media of some rows. Descriptors of segments that the decoder does not know yet come along with it."""

    rows: list[list[MediumRequest]]
    options: MediaOptions | None
    """None where they are those of the last request; given with the descriptor of the input segment."""
    output: int
    """Number of the segment into which patches go; the last descriptor is its, if it is new."""
    forget: tuple[int, ...]
    """Segments that are no longer used."""
    thumbnails: tuple[int, int] | None
    """(longest side in pixels, frames of a video) where small JPEGs are wanted in place of patches."""


def main(descriptor: int, resize: Resize) -> None:
    """The nursery: fork decoders and end them, as the actor says over the socket behind `descriptor`."""
    control = socket.socket(fileno=descriptor)
    control.settimeout(_PARENT_CHECK_S)
    parent = os.getppid()
    _import_codecs(resize)
    gc.freeze()  # so that collecting garbage in a decoder does not copy the nursery's memory
    control.sendall(b"!")
    decoder = 0
    while os.getppid() == parent:
        try:
            message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        except TimeoutError:
            continue
        except OSError:
            break
        if not message:
            break
        if message == SPAWN:
            decoder = os.fork()
            if not decoder:
                control.close()
                _run_decoder(socket.socket(fileno=descriptors[0]))
            os.close(descriptors[0])
            answer = decoder
        else:
            # A decoder that hung up is about to end: what ended it is worth a moment's wait.
            answer, decoder = _end(decoder, wait_s=_LAST_WORDS_S if message == AWAIT else 0.0), 0
        control.sendall(answer.to_bytes(LENGTH_BYTES, "big", signed=True))
    if decoder:
        _end(decoder)


def _end(decoder: int, *, wait_s: float = 0.0) -> int:
    """Kill a decoder if it still runs after so many seconds; its exit code, or minus the signal that ended it."""
    until = time.monotonic() + wait_s
    while True:
        ended, status = os.waitpid(decoder, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            break
        time.sleep(0.002)
    os.kill(decoder, signal.SIGKILL)
    _, status = os.waitpid(decoder, 0)
    return os.waitstatus_to_exitcode(status)


def _import_codecs(resize: Resize) -> None:
    import av.logging
    from PIL import Image

    import pipeline.preprocess.decode
    import pipeline.preprocess.thumbnail  # noqa: F401

    av.logging.set_level(None)
    Image.init()
    if resize == "torch":  # for Pillow's it would be a second and 150 MB for nothing
        import torch

        torch.set_num_threads(1)


def _run_decoder(answers: socket.socket) -> None:
    """Serve requests until the actor closes the socket. Never returns."""
    try:
        _die_with_parent()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 2)  # codecs written in C complain there, once for each broken file
        Decoder(answers).serve()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the actor is gone
    finally:
        os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class Decoder:
    """Answers requests over a socket: for each, lines of JSON that hold one answer a medium, in order."""

    def __init__(self, answers: socket.socket) -> None:
        self._socket = answers
        self._input: Segment | None = None
        self._outputs: dict[int, Segment] = {}
        self._options = MediaOptions()

    def serve(self) -> None:
        """Until the other side hangs up."""
        while (request := self._receive()) is not None:
            waiting: list[dict[str, Any]] = []
            sent = time.monotonic()
            for answer in self._answers(request):
                waiting.append(answer)
                # Few messages keep the actor asleep; but what took long must not be lost to a later crash.
                if time.monotonic() - sent > _ANSWER_INTERVAL_S:
                    self._send(waiting)
                    waiting, sent = [], time.monotonic()
            if waiting:
                self._send(waiting)

    def _send(self, answers: list[dict[str, Any]]) -> None:
        self._socket.sendall(json.dumps(answers).encode() + b"\n")

    def _receive(self) -> Request | None:
        body, descriptors, _, _ = socket.recv_fds(self._socket, _READ_BYTES, MAX_DESCRIPTORS)
        while len(body) < LENGTH_BYTES or len(body) < LENGTH_BYTES + int.from_bytes(body[:LENGTH_BYTES], "big"):
            part = self._socket.recv(_READ_BYTES) if body else b""
            if not part:
                return None
            body += part
        request = Request(*pickle.loads(memoryview(body)[LENGTH_BYTES:]))
        if request.options is not None:
            self._options = request.options
            self._input = Segment(descriptors.pop(0))
        for number in request.forget:
            if number in self._outputs:
                self._outputs.pop(number).close()
        if descriptors:
            self._outputs[request.output] = Segment(descriptors[0])
        assert self._input is not None
        self._input.refresh()
        self._outputs[request.output].refresh()
        return request

    def _answers(self, request: Request) -> Iterator[dict[str, Any]]:
        output = _Output(self._outputs[request.output])
        first = 0
        for row in request.rows:
            media = [MediumRequest(*medium) for medium in row]
            if request.thumbnails is not None:
                yield from self._thumbnails(media, first, output, *request.thumbnails)
            elif self._options.max_visual_tokens is not None and len(media) > 1:
                yield from self._answers_within_budget(media, first, output)
            else:
                for number, medium in enumerate(media, first):
                    self._begin(number)
                    with _caught() as answer:
                        output.take(self._open(medium, fit=True), answer)
                    yield answer
            first += len(media)

    def _thumbnails(
        self, media: list[MediumRequest], first: int, output: _Output, max_side: int, num_frames: int
    ) -> Iterator[dict[str, Any]]:
        from pipeline.preprocess.thumbnail import encode_thumbnails

        for number, medium in enumerate(media, first):
            self._begin(number)
            with _caught() as answer:
                pictures = encode_thumbnails(
                    medium.kind, self._data(medium), self._options, max_side=max_side, num_frames=num_frames
                )
                answer["thumbnails"] = [output.store(picture) for picture in pictures]
            yield answer

    def _answers_within_budget(
        self, media: list[MediumRequest], first: int, output: _Output
    ) -> Iterator[dict[str, Any]]:
        """All media of the row are opened before any is decoded: a budget needs all their sizes first."""
        from pipeline.preprocess.size import fit_row

        opened: list[OpenMedium | None] = []
        answers: list[dict[str, Any]] = []
        spent: list[float] = []
        for number, medium in enumerate(media, first):
            begun = self._begin(number)
            opened.append(None)
            with _caught() as answer:
                opened[-1] = self._open(medium, fit=False)
            answers.append(answer)
            spent.append(time.monotonic() - begun)
        with _caught() as refusal:
            fit_row([medium for medium in opened if medium is not None], self._options.max_visual_tokens)
        for place, open_medium in enumerate(opened):
            if open_medium is None or refusal:
                yield answers[place] or refusal
                continue
            self._begin(first + place, spent[place])
            with _caught() as answer:
                output.take(open_medium, answer)
            opened[place] = None
            yield answer

    def _begin(self, number: int, spent_s: float = 0.0) -> float:
        assert self._input is not None
        begun = time.monotonic()
        Progress.write(self._input, number, begun - spent_s)
        return begun

    def _open(self, medium: MediumRequest, *, fit: bool) -> OpenMedium:
        from pipeline.preprocess.decode import OpenMedium
        from pipeline.preprocess.size import fit_row

        opened = OpenMedium(medium.kind, self._data(medium), MediumSettings(*medium.settings), self._options)
        if fit:
            fit_row([opened], self._options.max_visual_tokens)
        return opened

    def _data(self, medium: MediumRequest) -> memoryview:
        assert self._input is not None
        return memoryview(self._input.map)[medium.offset : medium.offset + medium.size]


class _Output:
    """Hands out pieces of the output segment, one after the other."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._used = 0

    def take(self, medium: OpenMedium, answer: dict[str, Any]) -> None:
        """See a medium into the segment, and say in the answer where and what it is."""
        start = self._used
        seen = medium.see(source="", allocate=self._allocate)
        receipt = seen.receipt
        answer["patches"] = (start, *seen.patches.shape)
        answer["receipt"] = {field.name: getattr(receipt, field.name) for field in fields(receipt)}

    def store(self, data: bytes) -> tuple[int, int]:
        """Copy bytes into the segment: (start, size)."""
        start = self._used
        self._allocate(len(data))[:] = np.frombuffer(data, dtype=np.uint8)
        return start, len(data)

    def _allocate(self, num_bytes: int) -> Uint8Array:
        start = self._used
        self._used = -(-(start + num_bytes) // _ALIGNMENT) * _ALIGNMENT
        self._segment.reserve(self._used)
        return np.frombuffer(self._segment.map, dtype=np.uint8, count=num_bytes, offset=start)


@contextlib.contextmanager
def _caught() -> Iterator[dict[str, Any]]:
    """An answer that the body fills; whatever it raises becomes an answer too."""
    answer: dict[str, Any] = {}
    try:
        yield answer
    except RowError as error:
        answer["error"] = (type(error).__name__, str(error))
    except MemoryError:
        answer["error"] = (MediaMemoryError.__name__, "decoding the medium ran out of memory")
    except Exception as error:  # a mistake of ours or a library's, which must not cost more than this row
        message = f"the decoder failed in a way that was not foreseen: {type(error).__name__}: {error}"
        answer["error"] = (DecoderCrash.__name__, message)
