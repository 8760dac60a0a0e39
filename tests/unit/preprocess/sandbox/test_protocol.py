"""The decoder's progress in shared memory is whole at every moment, whenever its writer loses the core."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator

import pytest

from pipeline.preprocess.sandbox.protocol import PROGRESS_BYTES, read_progress, write_progress
from pipeline.preprocess.sandbox.shared_memory import Segment

_LATEST = 1 << 15


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create()
    made.reserve(PROGRESS_BYTES)
    yield made
    made.close()


@pytest.mark.parametrize("number", [0, 1, 7, 1 << 16, (1 << 20) - 1])
@pytest.mark.parametrize("started", [0.0, 0.25, 12345.678, 3e9])
def test_progress_is_read_as_it_was_written(segment: Segment, number: int, started: float) -> None:
    write_progress(segment, number, started)
    assert read_progress(segment) == (number, pytest.approx(started, abs=0.001))


def test_the_memory_can_be_resized_between_two_writes(segment: Segment) -> None:
    write_progress(segment, 3, 1.5)
    segment.reserve(8 << 20)
    assert read_progress(segment) == (3, 1.5)
    segment.trim(1 << 20)
    write_progress(segment, 4, 2.5)
    assert read_progress(segment) == (4, 2.5)


def test_progress_is_whole_wherever_its_writer_is_stopped(segment: Segment) -> None:
    # The numbers' bytes all change from one write to the next, and so do the times'.
    write_progress(segment, 1, 1.0)
    writer = os.fork()
    if writer == 0:
        while True:
            write_progress(segment, _LATEST, float(_LATEST))
            write_progress(segment, 1, 1.0)
    rng = random.Random(1)
    try:
        for _ in range(2000):
            os.kill(writer, signal.SIGSTOP)
            os.waitpid(writer, os.WUNTRACED)
            number, started = read_progress(segment)
            assert number in (1, _LATEST) and started == number
            os.kill(writer, signal.SIGCONT)
            until = time.perf_counter() + rng.random() * 2e-4
            while time.perf_counter() < until:
                number, started = read_progress(segment)
                assert number in (1, _LATEST) and started == number
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
