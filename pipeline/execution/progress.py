"""What a person sees of a run: one live line, and the summary at the end."""

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
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline import storage
from pipeline.execution.feeding import MUCH_STARVED, starved_share
from pipeline.results.run_folder import RunFolder
from pipeline.schema import Status

_WINDOW_S = 30.0
_PLAIN_EVERY_S = 10.0
_NOTE_EVERY_S = 5.0
_PUBLISH_EVERY_S = 60.0


@dataclass
class Tally:
    """Counts of a run: all of the folder's rows, and the pace of this process's."""

    total: int
    done_before: int
    failed_before: int = 0
    rows: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    visual_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)
    began: float | None = None
    """When the first row was begun, with an engine loaded: what came before is start-up."""
    last_row: float | None = None
    _recent: deque[tuple[float, int, int]] = field(default_factory=deque)

    def add(self, table: pa.Table) -> None:
        """Count finished rows (schema.result_schema)."""
        now = time.monotonic()
        tokens = _total(table, "num_output_tokens")
        self.last_row = now
        self.rows += table.num_rows
        self.output_tokens += tokens
        self.prompt_tokens += _total(table, "num_prompt_tokens")
        self.visual_tokens += _total(table, "num_visual_tokens")
        for status, kind in zip(
            table.column("status").to_pylist(), table.column("error_type").to_pylist(), strict=True
        ):
            if status != Status.OK:
                self.errors[kind] += 1
        self._recent.append((now, table.num_rows, tokens))
        while now - self._recent[0][0] > _WINDOW_S:
            self._recent.popleft()

    @property
    def done(self) -> int:
        """Rows that the folder answers."""
        return self.done_before + self.rows

    @property
    def failed(self) -> int:
        """Error rows among them."""
        return self.failed_before + self.errors.total()

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.started

    def pace(self) -> tuple[float, float]:
        """(rows/s, output tokens/s) of the last half minute."""
        if not self._recent:
            return 0.0, 0.0
        seconds = max(time.monotonic() - max(self._recent[0][0], self.started), 1.0)
        return sum(rows for _, rows, _ in self._recent) / seconds, sum(n for _, _, n in self._recent) / seconds

    def line(self) -> str:
        """The live line."""
        rows_s, tokens_s = self.pace()
        parts = [f"{self.done:,} of {self.total:,} rows"]
        if self.rows:
            parts += [f"{rows_s:.1f} rows/s", f"{tokens_s:,.0f} tokens/s"]
        parts.append(f"{self.failed:,} errors")
        if rows_s > 0 and self.done < self.total:
            parts.append(f"{_duration((self.total - self.done) / rows_s)} left")
        elif not self.rows:
            parts.append(f"starting ({self.elapsed:.0f} s)")
        return ", ".join(parts)


class Progress:
    """Shows a tally: a live line on a terminal, a plain line now and then elsewhere (logs, CI)."""

    def __init__(self, console: Console, tally: Tally) -> None:
        self._console, self._tally = console, tally
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)
        self._last = time.monotonic()

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def _render(self) -> Text:
        return Text(self._tally.line())

    def tick(self) -> None:
        """Show a plain line where there is no terminal and the last one is old."""
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last >= _PLAIN_EVERY_S:
            self._last = now
            self._console.print(self._tally.line(), markup=False)


class ProgressLog:
    """`progress.jsonl` in the run folder: counts over time, a line every few seconds, for the report's plots.

    It goes on where an earlier run's log ended. The whole file is published each time, since buckets can't append.
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
            self._lines = []  # none yet, or damaged: the plots begin anew

    def note(self, tally: Tally, *, last: bool = False) -> None:
        """Add a line when it is time for one, and publish now and then."""
        now = time.monotonic()
        if last or now - self._noted >= _NOTE_EVERY_S:
            self._noted = now
            counts = {"rows": tally.done, "output_tokens": self._tokens_before + tally.output_tokens}
            self._lines.append(json.dumps({"t": round(time.time(), 1), **counts, "errors": tally.failed}))
        if last or now - self._published >= _PUBLISH_EVERY_S:
            self._published = now
            text = "\n".join(self._lines) + "\n"
            with contextlib.suppress(OSError):  # the plots can do without; a full disk is told where it costs rows
                storage.publish(self._folder.file("progress.jsonl"), text.encode(), self._folder.storage_options)


def print_summary(console: Console, tally: Tally, path: str, error_types: Mapping[str, int], hint: str | None) -> None:
    """The table at the end of a run."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("rows", f"{tally.done:,} of {tally.total:,} ({tally.failed:,} errors)")
    for kind, count in sorted(error_types.items(), key=lambda item: -item[1]):
        table.add_row("", f"{count:,} {kind}")
    rows_s, tokens_s = run_pace(tally)
    table.add_row(
        "this run", f"{tally.rows:,} rows in {_duration(tally.elapsed)}; {rows_s:.1f} rows/s, {tokens_s:,.0f} tokens/s"
    )
    if hint:
        table.add_row("bottleneck", hint)
    table.add_row("output", path)
    console.print(table)


def run_pace(tally: Tally) -> tuple[float, float]:
    """(rows/s, output tokens/s) from the first row's beginning to the last one's end: start-up is left out, filling
    and emptying the stages is not."""
    if tally.last_row is None:
        return 0.0, 0.0
    began = tally.started if tally.began is None else tally.began
    seconds = max(tally.last_row - began, 1e-9)
    return tally.rows / seconds, tally.output_tokens / seconds


def bottleneck(reports: Sequence[Mapping[str, Any]]) -> str | None:
    """One sentence on which stage held the other back, and what to change; None before there is anything to say."""
    starved = starved_share(reports)
    if starved is None:
        return None
    if starved > MUCH_STARVED:
        actors = sum(report.get("kind") == "preprocess" for report in reports)
        more = max(1, math.ceil(actors * starved / max(1 - starved, 0.05)))
        return (
            f"preprocessing held the engine back for {starved:.0%} of the time: "
            f"{more} more CPU actor{'s' if more > 1 else ''} (resources.preprocess_actors)"
        )
    return f"the engine was busy {1 - starved:.0%} of the time: more or faster engines would help, more CPU actors not"


def print_samples(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A handful of answers beside their references."""
    table = Table(title="a few rows", title_justify="left", show_lines=False)
    for name in ("task", "answer", "reference", ""):
        table.add_column(name, overflow="fold")
    for row in rows:
        right = row["text"] == row["reference"]
        cells = [_one_line(row.get(name)) for name in ("task", "text", "reference")]
        table.add_row(*cells, "✓" if right else "✗")
    console.print(table)


def _one_line(value: Any) -> Text:
    """Any text of a row, short and without what a terminal would obey."""
    words = " ".join("".join(c if c.isprintable() else " " for c in str(value or "")).split())
    return Text(words if len(words) <= 160 else words[:157] + "...")


def _total(table: pa.Table, name: str) -> int:
    import pyarrow.compute as pc

    return int(pc.sum(table.column(name)).as_py() or 0)


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
