"""Warm-up: which graphs are captured within how many seconds, by a clock of our own."""

from __future__ import annotations

from pipeline.engine.cuda_graph import graph_sizes
from pipeline.engine.scheduling.admission import AdmissionRules
from pipeline.engine.warm_up import MAX_SECONDS, capture_largest_first, first_request


class Captures:
    """Captures that take as long as they are told, on a clock that goes on only meanwhile."""

    def __init__(self, seconds: dict[int, float], usual: float) -> None:
        self.seconds = seconds
        self.usual = usual
        self.now = 1000.0
        self.sizes: list[int] = []

    def capture(self, size: int) -> None:
        self.sizes.append(size)
        self.now += self.seconds.get(size, self.usual)

    def run(self, sizes: list[int], max_seconds: float) -> list[int]:
        capture_largest_first(sizes, self.capture, max_seconds=max_seconds, clock=lambda: self.now)
        return self.sizes


def test_all_sizes_are_captured_where_there_is_time_the_largest_first() -> None:
    sizes = graph_sizes(256)
    assert Captures({}, 0.2).run(sizes, 10.0) == sizes[::-1]


def test_capturing_stops_before_the_bound_and_keeps_the_largest() -> None:
    captures = Captures({}, 1.5)
    assert captures.run(graph_sizes(256), 10.0) == [256, 224, 192, 160, 128, 112]
    assert captures.now - 1000 <= 10.0


def test_a_slow_first_capture_is_finished_and_is_the_last_where_it_took_all_the_time() -> None:
    assert Captures({256: 12.0}, 0.1).run(graph_sizes(256), 10.0) == [256]


def test_a_slow_capture_in_between_makes_the_next_one_wait_for_its_batch() -> None:
    assert Captures({224: 6.0}, 0.1).run(graph_sizes(256), 10.0) == [256, 224]


def test_warm_up_is_seconds() -> None:
    assert MAX_SECONDS <= 30


def test_the_first_request_fits_whatever_there_is_room_for() -> None:
    for room in (4, 5, 40, 100_000):
        request = first_request(7, 14, max_length=room)
        rules = AdmissionRules(100, 7, 8, room, cache_tokens=room)
        layout = rules.admit(request)[0].layout
        assert layout.runs == ((0, 0, 0, min(256, room - 3)),)
