"""The decoder: answers requests until the actor closes the connection. Runs in a process of its own.

Knows how media are decoded and how to answer; not rows, where bytes come from, or when to give up.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import numpy as np

from pipeline.errors import DecoderCrash, MediaMemoryError, RowError
from pipeline.preprocess.decode import OpenMedium
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.patches import Uint8Array
from pipeline.preprocess.sandbox.protocol import Answer, DecodeRequest, StoredMedium, write_progress
from pipeline.preprocess.sandbox.shared_memory import Segment
from pipeline.preprocess.size import fit_row
from pipeline.preprocess.thumbnail import encode_thumbnails

_ALIGNMENT = 64
_ANSWER_INTERVAL_S = 0.5


def serve(connection: Connection, segments: Sequence[Segment]) -> None:
    """Answer with lists of `Answer`, each a line of JSON. The first message must be the MediaOptions, all others are
    DecodeRequests.

    Raises EOFError when the other side hangs up.
    """
    decoder = _Decoder(connection.recv(), segments)
    to_actor = open(connection.fileno(), "wb", closefd=False)  # noqa: SIM115  # as long as this process lives

    def send(answers: Sequence[Answer]) -> None:
        to_actor.write(json.dumps(answers).encode() + b"\n")
        to_actor.flush()

    while True:
        waiting: list[Answer] = []
        last_sent = time.monotonic()
        for answer in decoder.answers(connection.recv()):
            waiting.append(answer)
            # Few messages let the actor sleep, but long work must not be lost to a later crash.
            if time.monotonic() - last_sent > _ANSWER_INTERVAL_S:
                send(waiting)
                waiting, last_sent = [], time.monotonic()
        if waiting:
            send(waiting)


class _Decoder:
    def __init__(self, options: MediaOptions, segments: Sequence[Segment]) -> None:
        self._options = options
        self._input, *self._outputs = segments

    def answers(self, request: DecodeRequest) -> Iterator[Answer]:
        """One for each medium of the request, in order."""
        self._input.refresh()
        output = _Output(self._outputs[request.output])
        first = 0
        for group in request.groups:
            if request.thumbnails is None:
                yield from self._patches(group, first, output)
            else:
                yield from self._thumbnails(group, first, output, request.thumbnails)
            first += len(group)

    def _patches(self, group: Sequence[StoredMedium], first: int, output: _Output) -> Iterator[Answer]:
        """All media of a group are opened before any is decoded: the budget needs all their sizes first."""
        answers = [Answer() for _ in group]
        opened: list[OpenMedium | None] = [None] * len(group)
        seconds = [0.0] * len(group)
        for index, medium in enumerate(group):
            started = self._begin(first + index)
            with _caught_in(answers[index]):
                opened[index] = OpenMedium(medium.kind, self._bytes(medium), medium.settings, self._options)
            seconds[index] = time.monotonic() - started
        refusal = Answer()
        with _caught_in(refusal):
            fit_row([medium for medium in opened if medium is not None], self._options.max_visual_tokens)
        for index, answer in enumerate(answers):
            open_medium, opened[index] = opened[index], None
            if open_medium is None or refusal:
                yield answer or refusal
                continue
            self._begin(first + index, seconds[index])
            with _caught_in(answer):
                start, seen = output.used, open_medium.see(source="", allocate=output.allocate)
                answer["patches"] = (start, *seen.patches.shape)
                answer["receipt"] = vars(seen.receipt)
                answer["prompt_seconds"], answer["seconds_per_step"] = list(seen.prompt_seconds), seen.seconds_per_step
            yield answer

    def _thumbnails(
        self, group: Sequence[StoredMedium], first: int, output: _Output, max_side: int
    ) -> Iterator[Answer]:
        for number, medium in enumerate(group, first):
            self._begin(number)
            answer = Answer()
            with _caught_in(answer):
                answer["thumbnails"] = []
                for picture in encode_thumbnails(medium.kind, self._bytes(medium), self._options, max_side=max_side):
                    answer["thumbnails"].append((output.used, len(picture)))
                    output.allocate(len(picture))[:] = np.frombuffer(picture, dtype=np.uint8)
            yield answer

    def _begin(self, number: int, seconds_before: float = 0.0) -> float:
        started = time.monotonic()
        write_progress(self._input, number, started - seconds_before)
        return started

    def _bytes(self, medium: StoredMedium) -> memoryview:
        return memoryview(self._input.map)[medium.offset : medium.offset + medium.size]


class _Output:
    """Hands out pieces of an output segment, one after the other."""

    def __init__(self, segment: Segment) -> None:
        segment.refresh()
        self._segment = segment
        self.used = 0
        """Offset of the next piece."""

    def allocate(self, num_bytes: int) -> Uint8Array:
        """Uninitialized memory [num_bytes]."""
        start = self.used
        self.used = -(-(start + num_bytes) // _ALIGNMENT) * _ALIGNMENT
        self._segment.reserve(self.used)
        return np.frombuffer(self._segment.map, dtype=np.uint8, count=num_bytes, offset=start)


@contextlib.contextmanager
def _caught_in(answer: Answer) -> Iterator[None]:
    """Turn whatever the body raises into the answer's error."""
    try:
        yield
    except RowError as error:
        answer["error"] = (type(error).__name__, str(error))
    except MemoryError:
        answer["error"] = (MediaMemoryError.__name__, "decoding the medium ran out of memory")
    except Exception as error:  # a bug of ours or of a library, which must not cost more than this row
        message = f"the decoder failed in an unforeseen way: {type(error).__name__}: {error}"
        answer["error"] = (DecoderCrash.__name__, message)
