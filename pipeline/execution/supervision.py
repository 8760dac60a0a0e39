"""Which rows are inside which actor, so that one that kills its actor is found, run alone, and given up in the end.

Ray restarts a dead actor and runs its tasks again. A row that kills would do so for ever; so each actor tells the
ledger what it begins and ends, and a restarted actor what it was in the middle of. Rows that were under way when
their actor died are run again alone; a row that dies alone twice becomes an error row. (Once would do if only rows
killed actors; but nodes and operators do too, and a good row must not be lost to a second accident.)

Plain bookkeeping in one small actor; knows no rows, only their places.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MAX_LONE_DEATHS = 2

Place = tuple[int, int]
"""(manifest file, row in it)."""


@dataclass
class _Actor:
    kind: str
    handle: Any
    open: dict[Place, tuple[float, bool]] = field(default_factory=dict)
    """Rows under way: since when, and whether alone."""
    facts: dict[str, Any] = field(default_factory=dict)
    moved: float = field(default_factory=time.monotonic)
    """When it last began or ended a row, or a figure of its work changed: an engine in the middle of long answers ends
    no row for long, and steps all the while."""


class Ledger:
    """The actor that keeps the book; also remembers what the stages last said of themselves."""

    def __init__(self) -> None:
        self._actors: dict[str, _Actor] = {}
        self._deaths: dict[Place, int] = {}
        self._lone_deaths: dict[Place, int] = {}
        self._restarts = 0
        self._first_row: float | None = None
        self._first_engine: float | None = None
        self._traces: list[bytes] = []

    def born(self, who: str, kind: str, handle: Any) -> None:
        """An actor begins its life, or a new one after it died: what it had under way is suspect."""
        if who in self._actors:
            self._restarts += 1
            self.killed(who)
        self._actors[who] = _Actor(kind, handle)
        if kind == "engine" and self._first_engine is None:
            self._first_engine = time.monotonic()

    def killed(self, who: str) -> None:
        """An actor has died: what it had under way is suspect. Whoever kills one says so before; otherwise it is
        noticed when the actor is born again, and until then a slow start would look like rows that hang."""
        for place, (_, alone) in self._actors[who].open.items():
            self._deaths[place] = self._deaths.get(place, 0) + 1
            if alone:
                self._lone_deaths[place] = self._lone_deaths.get(place, 0) + 1
        self._actors[who].open.clear()

    def begin(self, who: str, places: Sequence[Place]) -> dict[Place, int]:
        """Rows are about to run together. Those that must not (they were there at a death) are given back, with the
        number of times that they died alone."""
        suspects = {place: self._lone_deaths.get(place, 0) for place in places if place in self._deaths}
        now = time.monotonic()
        if self._first_row is None:
            self._first_row = now
        actor = self._actors[who]
        if not actor.open:  # more rows for one that stands still are no sign of life
            actor.moved = now
        actor.open.update({place: (now, False) for place in places if place not in suspects})
        return suspects

    def working_s(self) -> float:
        """Seconds since the job was up: an engine loaded, and the first row begun. 0 before that."""
        if self._first_row is None or self._first_engine is None:
            return 0.0
        return time.monotonic() - max(self._first_row, self._first_engine)

    def begin_alone(self, who: str, place: Place) -> None:
        """A suspect is about to run with nothing beside it."""
        now = time.monotonic()
        self._actors[who].moved = now
        self._actors[who].open[place] = (now, True)

    def end(self, who: str, places: Sequence[Place]) -> None:
        """Rows are done."""
        self._actors[who].moved = time.monotonic()
        for place in places:
            self._actors[who].open.pop(place, None)

    def report(self, who: str, facts: dict[str, Any]) -> None:
        """An actor's latest figures."""
        if who in self._actors:
            actor = self._actors[who]
            if facts != actor.facts:
                actor.moved = time.monotonic()
            actor.facts = facts

    def reports(self) -> list[dict[str, Any]]:
        """The latest figures of every actor."""
        return [{"kind": actor.kind, **actor.facts} for actor in self._actors.values()]

    def keep_trace(self, trace: bytes) -> None:
        """An engine's profile, for the driver to fetch."""
        self._traces.append(trace)

    def traces(self, first: int) -> list[bytes]:
        """Profiles from this number on."""
        return self._traces[first:]

    def under_way(self) -> list[tuple[str, str, Any, Place, float, float]]:
        """(actor, kind, handle, oldest row, its age, the time without a sign of life) of every actor that has rows
        under way; in seconds."""
        now = time.monotonic()
        found = []
        for who, actor in self._actors.items():
            if actor.open:
                place, (since, _) = min(actor.open.items(), key=lambda item: item[1][0])
                found.append((who, actor.kind, actor.handle, place, now - since, now - actor.moved))
        return found

    def abandon(self) -> list[Any]:
        """A flow has been given up: nothing is under way any more. Gives the handles of all its actors."""
        handles = [actor.handle for actor in self._actors.values()]
        for actor in self._actors.values():
            actor.open.clear()
        return handles

    def num_restarts(self) -> int:
        """Actors that died and came back."""
        return self._restarts


class Company:
    """Rows run together, or one runs alone: a lock with many sharers or one owner. The lone one goes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharers = 0
        self._lone_waiting = 0
        self._lone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Beside others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lone and not self._lone_waiting)
            self._sharers += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharers -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """With nothing beside it."""
        with self._changed:
            self._lone_waiting += 1
            self._changed.wait_for(lambda: not self._lone and not self._sharers)
            self._lone_waiting -= 1
            self._lone = True
        try:
            yield
        finally:
            with self._changed:
                self._lone = False
                self._changed.notify_all()
