"""The watchdog looks often enough to find one actor of many that hangs, and reports when no row finishes at all."""

from __future__ import annotations

from pipeline.execution.supervision import Watchdog


class Actors:
    """A clock, and actors of which one stalls from a moment on until it is killed."""

    def __init__(self, hangs_from: float | None) -> None:
        self.now, self.since, self.looks = 0.0, hangs_from, 0

    def kill_stalled(self, timeout_s: float, describe_all: bool) -> list[str]:
        self.looks += 1
        stuck = self.since is not None and self.now - self.since >= timeout_s
        if stuck:
            self.since = None
        return ["killed" if stuck else "left alone"] if stuck or describe_all else []


def printed(actors: Actors, *, seconds: int, rows_until: float) -> list[tuple[float, str]]:
    watchdog = Watchdog(100.0, actors.kill_stalled, lambda: actors.now)
    lines = []
    for second in range(seconds):
        actors.now = float(second)
        lines += [(actors.now, line) for line in watchdog.look(row_finished=second < rows_until)]
    return lines


def test_an_actor_that_hangs_is_found_while_the_others_finish_rows() -> None:
    actors = Actors(hangs_from=50.0)
    lines = printed(actors, seconds=400, rows_until=400)
    assert [line for _, line in lines] == ["an actor made no progress for 100 s:", "  killed"]
    assert 150 <= lines[0][0] <= 160
    assert actors.looks < 50


def test_every_actor_is_described_when_no_row_finishes_and_again_after_as_long() -> None:
    lines = printed(Actors(hangs_from=None), seconds=250, rows_until=10)
    assert [line for _, line in lines] == ["no row has finished for 100 s:", "  left alone"] * 2
    assert [when for when, _ in lines] == [109.0, 109.0, 209.0, 209.0]


def test_a_job_whose_rows_finish_is_left_alone() -> None:
    assert printed(Actors(hangs_from=None), seconds=1000, rows_until=1000) == []
