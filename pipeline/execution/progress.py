"""Counts of a run, the live line on the screen, and `progress.jsonl`."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline import storage
from pipeline.errors import counted
from pipeline.results.run_folder import RunFolder
from pipeline.schema import Status

_WINDOW_S = 30.0
_LINE_EVERY_S = 10.0
_NOTE_EVERY_S = 5.0
_PUBLISH_EVERY_S = 60.0
_STARVED_FRACTION = 0.1
"""Fraction of the engines' time without enough rows from which preprocessing is the bottleneck."""


@dataclass
class RunCounts:
    """Counts of all the folder's rows, and the pace of this run's."""

    total: int
    done_before: int
    failed_before: int = 0
    rows: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    visual_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)
    """For each error type the id and message of this run's first such row."""
    rows_started: float | None = None
    """When the first row began with an engine loaded: start-up is before that."""
    state: str = "starting"
    """What is going on before the first row is done."""
    last_row: float | None = None
    _recent: deque[tuple[float, int, int]] = field(default_factory=deque)
    """When each table of the last half minute came, its rows and output tokens."""
    _before_recent: float | None = None
    """When the table before them came."""

    def add(self, table: pa.Table) -> None:
        now = time.monotonic()
        prompt, visual, output = (
            pc.sum(table.column(f"num_{kind}_tokens")).as_py() or 0 for kind in ("prompt", "visual", "output")
        )
        self.last_row = now
        self.rows += table.num_rows
        self.prompt_tokens += prompt
        self.visual_tokens += visual
        self.output_tokens += output
        failed = table.filter(pc.not_equal(table.column("status"), Status.OK.value))
        for error_type, row_id, message in zip(
            *(failed.column(name).to_pylist() for name in ("error_type", "id", "error_message")), strict=True
        ):
            self.errors[error_type] += 1
            self.examples.setdefault(error_type, (row_id, message))
        self._recent.append((now, table.num_rows, output))
        while now - self._recent[0][0] > _WINDOW_S:
            self._before_recent = self._recent.popleft()[0]

    @property
    def done(self) -> int:
        return self.done_before + self.rows

    @property
    def failed(self) -> int:
        """Error rows among them."""
        return self.failed_before + self.errors.total()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def start_up(self) -> float:
        """Seconds from the beginning of the run to its first row."""
        return max(0.0, (self.rows_started or self.started) - self.started)

    def recent_pace(self) -> tuple[float, float]:
        """(rows/s, output tokens/s) of the last half minute."""
        if not self._recent:
            return 0.0, 0.0
        # The first table took its time too.
        began = self._before_recent or self.rows_started or self.started
        seconds = max(time.monotonic() - began, 1.0)
        return sum(rows for _, rows, _ in self._recent) / seconds, sum(n for _, _, n in self._recent) / seconds

    @property
    def row_seconds(self) -> float:
        """Seconds from the start of the first row to the end of the last: without start-up, with filling and emptying
        the stages."""
        if self.last_row is None:
            return 0.0
        return max(self.last_row - (self.started if self.rows_started is None else self.rows_started), 1e-9)

    def pace(self) -> tuple[float, float]:
        """(rows/s, output tokens/s) of the run over `row_seconds`."""
        if not self.row_seconds:
            return 0.0, 0.0
        return self.rows / self.row_seconds, self.output_tokens / self.row_seconds

    def line(self) -> str:
        rows_s, tokens_s = self.recent_pace()
        parts = [f"{self.done:,} of {counted(self.total, 'row')}"]
        if self.rows:
            parts += [rate_text(rows_s), f"{tokens_s:,.0f} tokens/s"]
        parts.append(counted(self.failed, "error"))
        if rows_s > 0 and self.done < self.total:
            parts.append(f"{duration_text((self.total - self.done) / rows_s)} left")
        elif not self.rows:
            parts.append(f"{self.state} ({duration_text(self.elapsed)} since the start)")
        return ", ".join(parts)


class ProgressLine:
    """Shows the counts: a live line on a terminal, a plain line now and then elsewhere (logs, CI)."""

    def __init__(self, console: Console, counts: RunCounts) -> None:
        self._console, self._counts = console, counts
        self._live = Live(console=console, get_renderable=lambda: Text(counts.line()), transient=True)
        self._last = time.monotonic()

    def __enter__(self) -> ProgressLine:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def tick(self) -> None:
        """Call this every second or so."""
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last >= _LINE_EVERY_S:
            self._last = now
            self._console.print(self._counts.line(), markup=False)


class ProgressLog:
    """`progress.jsonl` in the run folder: counts over time, a line every few seconds, for the report's plots.

    It continues an earlier run's log. The whole file is published each time, since buckets cannot append.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._lines: list[str] = []
        self._tokens_before = 0
        self._noted = self._published = time.monotonic()
        try:
            text = storage.read_bytes(folder.file("progress.jsonl"), folder.storage_options).decode()
            self._lines = text.splitlines()
            self._tokens_before = int(json.loads(self._lines[-1])["output_tokens"])
        except (OSError, ValueError, LookupError, TypeError):
            self._lines = []  # none yet, or damaged: the plots start afresh

    def note(self, counts: RunCounts, *, last: bool = False) -> None:
        """Add a line when it is time for one, and publish now and then."""
        now = time.monotonic()
        if last or now - self._noted >= _NOTE_EVERY_S:
            self._noted = now
            line = {"t": round(time.time(), 1), "rows": counts.done, "errors": counts.failed}
            self._lines.append(json.dumps({**line, "output_tokens": self._tokens_before + counts.output_tokens}))
        if last or now - self._published >= _PUBLISH_EVERY_S:
            self._published = now
            text = "\n".join(self._lines) + "\n"
            with contextlib.suppress(OSError):  # only plots need it; a full disk is reported where it costs rows
                storage.publish(self._folder.file("progress.jsonl"), text.encode(), self._folder.storage_options)


def starting_text(stats: Sequence[Mapping[str, Any]]) -> str:
    """What the actors are doing before the first row is done, from their latest stats."""
    engines = [one for one in stats if one.get("kind") == "engine"]
    # An engine that has only been registered has no stats yet.
    loading = [str(one.get("loading", "starting")) for one in engines if "loading" in one or one.keys() == {"kind"}]
    if loading:
        ready = f"{len(engines) - len(loading)} of {len(engines)} engines ready; " if len(engines) > 1 else ""
        return f"{ready}engine: {loading[0]}"
    rows = sum(int(one.get("rows", 0)) for one in stats if one.get("kind") == "preprocess")
    if not engines:
        return "starting actors" if not rows else f"{rows:,} rows preprocessed; the engine starts"
    tokens = sum(int(one.get("decode_tokens", 0)) for one in engines)
    return f"first rows: {rows:,} preprocessed, {tokens:,} tokens generated"


def bottleneck(stats: Sequence[Mapping[str, Any]]) -> str | None:
    """One sentence on which stage held the other back, and what to change; None before there is anything to say."""
    starved = starved_fraction(stats)
    if starved is None:
        return None
    if starved > _STARVED_FRACTION:
        working, fetching = (
            sum(float(one.get(name, 0)) for one in stats if one.get("kind") == "preprocess")
            for name in ("busy_s", "fetch_wait_s")
        )
        if fetching > working:
            return (
                f"fetching held the engine back for {starved:.0%} of the time: CPU actors waited for media "
                f"{fetching / (fetching + working):.0%} of theirs; storage that is nearer or answers faster, or more "
                "CPU actors, each of which fetches more at once (resources.preprocess_actors)"
            )
        actors = sum(one.get("kind") == "preprocess" for one in stats)
        more = max(1, math.ceil(actors * starved / max(1 - starved, 0.05)))
        return (
            f"preprocessing held the engine back for {starved:.0%} of the time: "
            f"{counted(more, 'more CPU actor')} (resources.preprocess_actors)"
        )
    return f"the engine was busy {1 - starved:.0%} of the time: more or faster engines would help, more CPU actors not"


def starved_fraction(stats: Sequence[Mapping[str, Any]]) -> float | None:
    """Fraction of the engines' time for which they had too few rows; None before there is anything to say.

    An engine is starved while it has no row at all, and, by the fraction of its free places, while it steps with
    places free and no row waiting for one: a few rows at a time keep an engine busy, far below what it can do.
    """
    engines = [one for one in stats if one.get("kind") == "engine"]
    busy, idle, unfilled = (
        sum(float(one.get(name, 0)) for one in engines) for name in ("busy_s", "idle_s", "unfilled_s")
    )
    return (idle + unfilled) / (busy + idle) if busy + idle >= 1.0 else None


def rate_text(rows_s: float) -> str:
    """Rows per second in three digits; per minute or hour where there are fewer than one."""
    for per, seconds in (("s", 1), ("min", 60), ("h", 3600)):
        rate = rows_s * seconds
        if rate >= 0.9995 or per == "h":
            digits = 0 if rate >= 99.95 else 1 if rate >= 9.995 else 2
            return f"{rate:,.{digits}f} rows/{per}"
    raise AssertionError


def duration_text(seconds: float) -> str:
    """Seconds, minutes or hours, as in `1 min 05 s`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
