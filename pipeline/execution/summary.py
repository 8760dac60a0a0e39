"""What a run prints at its end: rows, errors by type with an example, pace, and what to do next.

Knows texts and counts; not how they came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import InternalError, counted
from pipeline.execution.progress import RunCounts, duration_text, rate_text
from pipeline.results.run_folder import RunFolder

_MAX_ERROR_TYPES = 8


def print_summary(
    console: Console, counts: RunCounts, folder: RunFolder, errors: Mapping[str, int], bottleneck: str | None
) -> None:
    """The table at the end of a run. `errors` counts the error types of all the folder's rows."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("rows", f"{counts.done:,} of {counts.total:,} ({counted(counts.failed, 'error')})")
    by_count = sorted(errors.items(), key=lambda item: -item[1])
    for kind, count in by_count[:_MAX_ERROR_TYPES]:
        table.add_row("", error_line(kind, count, counts.examples.get(kind)))
    if (left_out := len(by_count) - _MAX_ERROR_TYPES) > 0:
        table.add_row("", counted(left_out, "more error type"))
    if by_count:
        kinds = by_count[0][0] if len(by_count) == 1 else f"{by_count[0][0]},..."
        again = f"the same command with --retry-failed, or --retry-failed={kinds}, runs failed rows again"
        table.add_row("", f"{folder.file('errors.jsonl')} lists them; {again}")
    table.add_row("this run", pace_text(counts))
    if bottleneck:
        table.add_row("bottleneck", bottleneck)
    table.add_row("output", folder.path)
    console.print(table)
    if InternalError.__name__ in counts.examples:
        row_id, message = counts.examples[InternalError.__name__]
        console.print(f"{InternalError.__name__}, as row {row_id}: {message}", markup=False, highlight=False)
    if counts.total and counts.failed == counts.total:
        console.print(f"EVERY ROW FAILED: 0 of {counted(counts.total, 'row')} answered", style="bold red")


def error_line(kind: str, count: int, example: tuple[str, str] | None) -> Text:
    """How many rows failed in one way, and the id and message of one of them."""
    return one_line(f"{count:,} {kind}" if example is None else f"{count:,} {kind}, as row {example[0]}: {example[1]}")


def pace_text(counts: RunCounts) -> str:
    """How many rows this run finished, how long it took, and the pace of its rows: two times, said apart."""
    if not counts.rows:
        return f"no rows in {duration_text(counts.elapsed)}"
    rows_s, tokens_s = counts.pace()
    started = f"{duration_text(counts.start_up)} to start, then " if counts.start_up >= 0.5 else ""
    rows = counted(counts.rows, "row")
    return f"{rows} in {duration_text(counts.elapsed)}: {started}{rate_text(rows_s)}, {tokens_s:,.0f} tokens/s"


def print_samples(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A handful of answers beside their `references`; whether an answer is one of them, if there are any."""
    table = Table(title="a few rows", title_justify="left", show_lines=False)
    for name in ("task", "answer", "reference", ""):
        table.add_column(name, overflow="fold")
    for row in rows:
        references = [text.strip() for text in row["references"]]
        cells = [one_line(text) for text in (row.get("task"), row["text"], " | ".join(dict.fromkeys(references)))]
        table.add_row(*cells, "" if not references else "✓" if row["text"].strip() in references else "✗")
    console.print(table)


def one_line(value: Any, max_length: int = 160) -> Text:
    """A value's text, short and without control characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value or "")).split())
    return Text(text if len(text) <= max_length else text[: max_length - 3] + "...")
