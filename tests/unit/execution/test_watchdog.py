"""The watchdog looks often enough to find one actor of many that hangs, and says so when no row finishes at all."""

from __future__ import annotations

from pipeline.execution.watchdog import Watchdog


class Actors:
    """A clock, and actors of which one stands still from a moment on until it is killed."""

    def __init__(self, hangs_from: float | None) -> None:
        self.now, self.since, self.looks = 0.0, hangs_from, 0

    def break_stall(self, seconds: float, *, tell: bool) -> list[str]:
        self.looks += 1
        stuck = self.since is not None and self.now - self.since >= seconds
        if stuck:
            self.since = None
        return ["killed" if stuck else "left alone"] if stuck or tell else []


def told(actors: Actors, *, seconds: int, rows_until: float) -> list[tuple[float, str]]:
    watchdog = Watchdog(100.0, actors.break_stall, lambda: actors.now)
    lines = []
    for second in range(seconds):
        actors.now = float(second)
        lines += [(actors.now, line) for line in watchdog.look(finished_row=second < rows_until)]
    return lines


def test_an_actor_that_hangs_is_found_while_the_others_finish_rows() -> None:
    actors = Actors(hangs_from=50.0)
    lines = told(actors, seconds=400, rows_until=400)
    assert [line for _, line in lines] == ["an actor has stood still for 100 s:", "  killed"]
    assert 150 <= lines[0][0] <= 160
    assert actors.looks < 50


def test_what_every_actor_does_is_told_when_no_row_finishes_and_again_after_as_long() -> None:
    lines = told(Actors(hangs_from=None), seconds=250, rows_until=10)
    assert [line for _, line in lines] == ["no row has finished for 100 s:", "  left alone"] * 2
    assert [when for when, _ in lines] == [109.0, 109.0, 209.0, 209.0]


def test_a_job_whose_rows_finish_is_left_alone() -> None:
    assert told(Actors(hangs_from=None), seconds=1000, rows_until=1000) == []
