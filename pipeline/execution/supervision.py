"""Which rows are inside which actor: rows that kill or hang their actor are found, run alone, and finally given up.

Ray restarts a dead actor and runs its tasks again, so a row that kills its actor would do so for ever. Each actor
therefore reports to the Supervisor which rows it begins and ends. Rows that were in progress when their actor died run
again alone; a row that dies alone twice becomes an error row. (Once would do if only rows killed actors, but nodes
and operators do too, and a good row must not be lost to a second accident.)

Knows row keys and Ray's handles of actors; not what is in a row, nor what a stage does.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import ray

from pipeline.execution.cluster import on_driver_node
from pipeline.execution.telemetry import Meter
from pipeline.manifest.files import WorkUnit

MAX_LONE_DEATHS = 2
_ANSWER_TIMEOUT_S = 10
_LOOKS_PER_TIMEOUT = 10

RowKey = tuple[int, int]
"""(manifest file, row in it)."""


@dataclass
class _Actor:
    kind: str
    handle: Any
    in_progress: dict[RowKey, tuple[float, bool]] = field(default_factory=dict)
    """When each row began, and whether it runs alone."""
    stats: dict[str, Any] = field(default_factory=dict)
    progressed: float = field(default_factory=time.monotonic)
    """When it last began or ended a row or its stats changed: an engine in the middle of long answers ends no row for
    a long time, but its stats change with every step."""


class ActorProgress(NamedTuple):
    """An actor with rows in progress. Times in seconds."""

    actor_id: str
    kind: str
    handle: Any
    oldest_row: RowKey
    oldest_row_s: float
    stalled_s: float


class Supervisor:
    """The bookkeeping; runs as one small Ray actor. It also keeps the latest stats of every actor."""

    def __init__(self) -> None:
        self._actors: dict[str, _Actor] = {}
        self._deaths: dict[RowKey, int] = {}
        self._lone_deaths: dict[RowKey, int] = {}
        self._first_row: float | None = None
        self._first_engine: float | None = None
        self._traces: list[bytes] = []
        self._handed_over: dict[RowKey, list[npt.NDArray[np.uint32]]] = {}
        self._dtype: str | None = None

    def started(self, actor_id: str, kind: str, handle: Any) -> None:
        """An actor started, or restarted after it died: then its rows in progress are suspects."""
        if actor_id in self._actors:
            self.died(actor_id)
        self._actors[actor_id] = _Actor(kind, handle)

    def died(self, actor_id: str) -> None:
        """An actor died, so its rows in progress are suspects. Whoever kills an actor calls this first; other deaths
        are noticed at the restart, and until then a slow start would look like rows that hang."""
        for row, (_, alone) in self._actors[actor_id].in_progress.items():
            self._deaths[row] = self._deaths.get(row, 0) + 1
            if alone:
                self._lone_deaths[row] = self._lone_deaths.get(row, 0) + 1
        self._actors[actor_id].in_progress.clear()

    def begin(self, actor_id: str, rows: Sequence[RowKey]) -> dict[RowKey, int]:
        """Rows are about to run together. Returns the suspects among them, which must run alone, each with the number
        of times that it died alone."""
        suspects = {row: self._lone_deaths.get(row, 0) for row in rows if row in self._deaths}
        now = time.monotonic()
        if self._first_row is None:
            self._first_row = now
        actor = self._actors[actor_id]
        if not actor.in_progress:  # more rows for a stalled actor are no progress
            actor.progressed = now
        actor.in_progress.update({row: (now, False) for row in rows if row not in suspects})
        return suspects

    def begin_alone(self, actor_id: str, row: RowKey) -> None:
        """A suspect is about to run with nothing beside it."""
        now = time.monotonic()
        self._actors[actor_id].progressed = now
        self._actors[actor_id].in_progress[row] = (now, True)

    def end(self, actor_id: str, rows: Sequence[RowKey]) -> None:
        self._actors[actor_id].progressed = time.monotonic()
        for row in rows:
            self._actors[actor_id].in_progress.pop(row, None)

    def hand_over(self, unit: RowKey, rows: npt.NDArray[np.int64]) -> None:
        """A table with these rows of a unit is about to leave its actor. The unit is named by its first row."""
        self._handed_over.setdefault(unit, []).append((rows - unit[1]).astype(np.uint32))

    def handed_over(self, unit: RowKey) -> list[npt.NDArray[np.int64]]:
        """The rows of each table of the unit that has left an actor, in order."""
        return [rows.astype(np.int64) + unit[1] for rows in self._handed_over.get(unit, [])]

    def forget(self, units: Sequence[RowKey]) -> None:
        """All rows of these units have arrived: Ray will not run them again."""
        for unit in units:
            self._handed_over.pop(unit, None)

    def report(self, actor_id: str, stats: dict[str, Any]) -> None:
        actor = self._actors[actor_id]
        if stats != actor.stats:
            actor.progressed = time.monotonic()
        actor.stats = stats
        if "describe" in stats and self._first_engine is None:
            self._first_engine = time.monotonic()

    def first_dtype(self, dtype: str) -> str:
        """What the run's first engine computes in: this one, where none was before."""
        self._dtype = self._dtype or dtype
        return self._dtype

    def stats(self) -> list[dict[str, Any]]:
        return [{"kind": actor.kind, **actor.stats} for actor in self._actors.values()]

    def seconds_up(self) -> float:
        """Seconds since an engine was loaded and a first row had begun; 0 before that."""
        if self._first_row is None or self._first_engine is None:
            return 0.0
        return time.monotonic() - max(self._first_row, self._first_engine)

    def keep_trace(self, trace: bytes) -> None:
        """Keep an engine's profile until the driver fetches it."""
        self._traces.append(trace)

    def traces(self, first: int) -> list[bytes]:
        return self._traces[first:]

    def in_progress(self) -> list[ActorProgress]:
        now = time.monotonic()
        found = []
        for actor_id, actor in self._actors.items():
            if actor.in_progress:
                row, (began, _) = min(actor.in_progress.items(), key=lambda item: item[1][0])
                found.append(
                    ActorProgress(actor_id, actor.kind, actor.handle, row, now - began, now - actor.progressed)
                )
        return found

    def abandon(self) -> list[Any]:
        """The job failed: no row is in progress any more. Returns the handles of all actors."""
        for actor in self._actors.values():
            actor.in_progress.clear()
        return [actor.handle for actor in self._actors.values()]


class OpenUnits:
    """Units of which rows are still to come."""

    def __init__(self, work: Sequence[WorkUnit]) -> None:
        """`work`: in manifest order."""
        self._units = [(unit.file, unit.start) for unit in work]
        self._num_left = [unit.num_rows for unit in work]

    def arrived(self, rows: Iterable[RowKey]) -> list[RowKey]:
        """Count rows, each once. Returns the units that are complete with them, by their first rows."""
        complete = []
        for row in rows:
            place = bisect.bisect_right(self._units, row) - 1
            self._num_left[place] -= 1
            if not self._num_left[place]:
                complete.append(self._units[place])
        return complete


class Supervision:
    """The driver's side: starts the Supervisor, reads it, and kills actors that make no progress."""

    def __init__(self, stall_timeout_s: float) -> None:
        self._watchdog = Watchdog(stall_timeout_s, self._kill_stalled)
        # On the driver's node, so that no other node's loss takes it along.
        self.actor = ray.remote(Supervisor).options(num_cpus=0, **on_driver_node()).remote()

    def stats(self) -> list[dict[str, Any]]:
        """The latest stats of every actor; empty when the Supervisor does not answer."""
        found: list[dict[str, Any]] = self._ask(self.actor.stats, [])
        return found

    def seconds_up(self) -> float:
        """Seconds since rows began to flow; 0 before, and when the Supervisor does not answer."""
        seconds: float = self._ask(self.actor.seconds_up, 0.0)
        return seconds

    def traces(self, first: int) -> list[bytes]:
        found: list[bytes] = ray.get(self.actor.traces.remote(first))
        return found

    def forget(self, units: Sequence[RowKey]) -> None:
        """See Supervisor.forget."""
        if units:
            self.actor.forget.remote(units)

    def kill_actors(self) -> None:
        """End the stages of a job that failed: on a Ray that outlives the job they would keep their CPUs."""
        for handle in self._ask(self.actor.abandon, []):
            ray.kill(handle, no_restart=True)

    def _ask(self, method: Any, default: Any) -> Any:
        try:
            return ray.get(method.remote(), timeout=_ANSWER_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError):
            return default

    def watch(self, *, row_finished: bool) -> list[str]:
        """Call this every second or so. Kills actors without progress for `run.stall_timeout_s`; their rows run again,
        alone. Returns the lines to print."""
        return self._watchdog.look(row_finished=row_finished)

    def _kill_stalled(self, timeout_s: float, describe_all: bool) -> list[str]:
        """Kill actors without progress for so many seconds. Returns a line for each actor, if any was killed or all are
        to be described."""
        actors: list[ActorProgress] = ray.get(self.actor.in_progress.remote())
        if not describe_all and all(one.stalled_s < timeout_s for one in actors):
            return []
        lines = []
        for one in actors:
            stalled = one.stalled_s >= timeout_s
            state = f"no progress for {one.stalled_s:.0f} s; killed" if stalled else "is working; left alone"
            file, row = one.oldest_row
            lines.append(
                f"{one.kind} actor {one.actor_id[:8]}: row {row} of manifest file {file} "
                f"since {one.oldest_row_s:.0f} s; {state}"
            )
            if stalled:
                ray.get(self.actor.died.remote(one.actor_id))
                ray.kill(one.handle, no_restart=False)
        return lines or ["no actor has a row: the rows wait for free resources on the cluster"]


class Watchdog:
    """When to look for stalled actors: often enough to find one of many, and whenever no row finishes at all."""

    def __init__(
        self,
        timeout_s: float,
        kill_stalled: Callable[[float, bool], Sequence[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_s, self._kill_stalled, self._clock = timeout_s, kill_stalled, clock
        self._last_row = self._last_look = clock()

    def look(self, *, row_finished: bool) -> list[str]:
        """Call this every second or so. Returns nothing, or a headline and a line for each actor."""
        now = self._clock()
        if row_finished:
            self._last_row = now
        nothing_finishes = now - self._last_row >= self._timeout_s
        if not nothing_finishes and now - self._last_look < self._timeout_s / _LOOKS_PER_TIMEOUT:
            return []
        self._last_look = now
        lines = self._kill_stalled(self._timeout_s, nothing_finishes)
        if not lines:
            return []
        headline = f"an actor made no progress for {self._timeout_s:.0f} s:"
        if nothing_finishes:
            self._last_row = now
            headline = f"no row has finished for {self._timeout_s:.0f} s:"
        return [headline, *(f"  {line}" for line in lines)]


class ActorReporter:
    """An actor's side: reports the rows that it begins and ends, and its stats.

    Stats are sent every second, and once more whenever no row is in progress: the actor may end at any moment after
    that, and what it has not sent is lost.
    """

    def __init__(self, supervisor: Any, kind: str, read_stats: Callable[[], dict[str, Any]]) -> None:
        context = ray.get_runtime_context()
        self._supervisor, self._actor_id, self._node = supervisor, context.get_actor_id(), context.get_node_id()
        self._kind, self._read_stats, self._meter = kind, read_stats, Meter()
        self._num_in_progress = 0
        self._count_lock, self._send_lock = threading.Lock(), threading.Lock()
        ray.get(supervisor.started.remote(self._actor_id, kind, context.current_actor))
        threading.Thread(target=self._send_for_ever, name="stats", daemon=True).start()

    def _send_for_ever(self) -> None:
        while True:
            self.send()
            time.sleep(1.0)

    def send(self) -> Any:
        with self._send_lock:
            stats = self._read_stats()
            self._meter.actor(self._kind, stats)
            return self._supervisor.report.remote(self._actor_id, {"node": self._node, **stats})

    def first_dtype(self, dtype: str) -> str:
        """See Supervisor.first_dtype."""
        return str(ray.get(self._supervisor.first_dtype.remote(dtype)))

    def begin(self, rows: Sequence[RowKey]) -> dict[RowKey, int]:
        """Rows run together from now on; returns those that must not (see Supervisor.begin)."""
        suspects: dict[RowKey, int] = ray.get(self._supervisor.begin.remote(self._actor_id, rows))
        self._count(len(rows) - len(suspects))
        return suspects

    def begin_alone(self, row: RowKey) -> None:
        ray.get(self._supervisor.begin_alone.remote(self._actor_id, row))
        self._count(1)

    def end(self, rows: Sequence[RowKey]) -> None:
        self._supervisor.end.remote(self._actor_id, rows)
        if rows and not self._count(-len(rows)):
            ray.get(self.send())

    def hand_over(self, unit: RowKey, rows: npt.NDArray[np.int64]) -> None:
        """See Supervisor.hand_over; returns once it is noted."""
        ray.get(self._supervisor.hand_over.remote(unit, rows))

    def handed_over(self, unit: RowKey) -> list[npt.NDArray[np.int64]]:
        found: list[npt.NDArray[np.int64]] = ray.get(self._supervisor.handed_over.remote(unit))
        return found

    def _count(self, change: int) -> int:
        with self._count_lock:
            self._num_in_progress += change
            return self._num_in_progress

    def keep_trace(self, trace: bytes) -> None:
        """Hand over a profile; returns once it would survive this actor's end."""
        ray.get(self._supervisor.keep_trace.remote(trace))


class ReadWriteLock:
    """Many holders together, or one alone. One that waits to be alone goes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_together = 0
        self._num_waiting = 0
        self._is_alone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_alone and not self._num_waiting)
            self._num_together += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._num_waiting += 1
            self._changed.wait_for(lambda: not self._is_alone and not self._num_together)
            self._num_waiting -= 1
            self._is_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._is_alone = False
                self._changed.notify_all()
